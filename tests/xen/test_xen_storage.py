# SPDX-License-Identifier: Apache-2.0
"""What a running guest sees of its storage: it grows, and gives back what is discarded."""

from collections.abc import Callable
from pathlib import Path

import pytest
from xen_host import COMPLAINTS, Slot, note, sh, typed

pytestmark = pytest.mark.usefixtures("guests")


@pytest.fixture
def guest(guests: None, best_slot: Slot, image: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """One with tools (its root is dom0's), and the image of 64 MiB as its xvda."""
    monkeypatch.setenv("DOMU_SLOT", best_slot.value)
    sh(f"domu -n u1 -m 400 -b -r -d '{best_slot.line(image)}'")
    return sh("xl domid u1").strip()


def sectors() -> int:
    return int(typed("u1", "cat /sys/block/xvda/size").split()[-1])


def test_a_resize_is_seen_at_once(guest: str, image: Path, eventually: Callable[..., None]) -> None:
    assert sectors() == (64 << 20) // 512
    sh(f"xvd resize {guest} xvda 96M")
    eventually(lambda: sectors() == (96 << 20) // 512)
    # The toolstack's way: the image becomes larger, and nobody is told.
    sh(f"truncate -s 128M {image}")
    eventually(lambda: sectors() == (128 << 20) // 512)
    typed("u1", "dd if=/dev/zero of=/dev/xvda bs=1M seek=127 count=1 oflag=direct 2>&1")
    typed("u1", f"! {COMPLAINTS}")


def blocks(image: Path) -> int:
    """KiB that the image's file has."""
    sh("sync")
    return image.stat().st_blocks // 2


def test_fstrim_and_blkdiscard_give_space_back(guest: str, image: Path) -> None:
    # All of it is written now, so that nothing but the file comes and goes afterwards.
    typed("u1", "mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 /dev/xvda")
    typed("u1", "mkdir -p /tmp/m && mount /dev/xvda /tmp/m")
    typed("u1", "dd if=/dev/urandom of=/tmp/m/f bs=1M count=24 conv=fsync 2>&1")
    written = blocks(image)
    typed("u1", "rm /tmp/m/f && sync && fstrim -v /tmp/m")
    trimmed = blocks(image)
    typed("u1", "umount /tmp/m && blkdiscard -f /dev/xvda")
    discarded = blocks(image)
    note(
        f"A guest's image of 64 MiB: {written} KiB after 24 MiB were written to a file, "
        f"{trimmed} KiB after fstrim, {discarded} KiB after blkdiscard"
    )
    assert trimmed <= written - (23 << 10)
    assert discarded == 0
    typed("u1", f"! {COMPLAINTS}")
