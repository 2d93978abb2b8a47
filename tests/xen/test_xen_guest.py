# SPDX-License-Identifier: Apache-2.0
"""A guest's kernel uses disks of ours, from `xl create` to its end, however that comes."""

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from xen_host import (
    COMPLAINTS,
    KINDS,
    ON_ARM,
    VERIFY,
    Backend,
    Kind,
    Slot,
    domu,
    each_kind,
    negotiated,
    report,
    sh,
    two_kinds,
    typed,
    whatever_is_lost,
)

pytestmark = pytest.mark.usefixtures("guests")

TREE_THEN_REBOOT = f"""
set -e
T="/usr/bin/fio $(echo /usr/lib/python3*/asyncio)"
fine() {{ ! {COMPLAINTS}; }}
if [ "$(blkid -o value -s TYPE /dev/xvda)" != ext4 ]; then
mkfs.ext4 -q /dev/xvda
mount /dev/xvda /mnt
cp -r $T /mnt
umount /mnt
e2fsck -fn /dev/xvda
fine
busybox reboot -f
fi
e2fsck -fn /dev/xvda
mount -o ro /dev/xvda /mnt
for p in $T; do diff -r $p /mnt/${{p##*/}}; done
umount /mnt
echo "md5 $(dd if=/dev/xvda bs=1M iflag=direct | md5sum)"
fine
"""
"""Short, because a PV guest's command line, which carries it, has 1024 bytes."""

LOAD = (
    "fio --name=l --filename=/dev/xvda --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite"
    " --bs=16k --size=32m --time_based --runtime=600"
)


@two_kinds
def test_a_file_system_survives_the_guests_reboot_and_is_in_the_image(
    slot: Slot,
    make_image: Callable[..., Path],
    image: Path,
    kind: Kind,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The guest's root comes through our backend too."""
    monkeypatch.setenv("DOMU_SLOT", slot.value)

    def boot() -> str:
        line = slot.line(make_image())
        return domu("-r", *kind.value, "-R", "-d", line, TREE_THEN_REBOOT)

    said = whatever_is_lost(boot)
    assert f"md5 {hashlib.md5(image.read_bytes()).hexdigest()}" in said


@each_kind
@pytest.mark.parametrize("target", ["{image}", "memory:64M"])
def test_a_guest_verifies_what_it_wrote(
    best_slot: Slot, image: Path, kind: Kind, target: str
) -> None:
    size = "--size=4m" if kind is Kind.PVH else ""  # slow without hardware's help
    line = best_slot.line(target.format(image=image))
    script = f"{VERIFY} {size} && ! {COMPLAINTS}"
    whatever_is_lost(lambda: domu(*kind.value, "-d", line, script))


def test_a_guest_uses_the_null_engine(best_slot: Slot) -> None:
    load = VERIFY.partition(" --verify")[0]
    domu("-d", best_slot.line("null:64M"), f"{load} && ! {COMPLAINTS}")


def test_both_ends_publish_what_they_agreed_on(slot: Slot, image: Path) -> None:
    domu("-n", "u1", "-b", "-d", slot.line(image))
    table = negotiated(int(sh("xl domid u1")))
    report(f"Linux {sh('uname -r').strip()} with a disk of {slot.name.lower()}", table)
    assert table["state"] == ("4", "4")
    assert table["protocol"] == ("arm-abi" if ON_ARM else "x86_64-abi", "")
    assert table["sectors"] == ("", "131072")
    assert table["feature-flush-cache"] == ("", "1")
    assert table["feature-discard"] == ("", "1")


@pytest.mark.parametrize("kind", KINDS[::3], ids=lambda kind: kind.name.lower())
def test_a_guest_destroyed_under_load_leaves_nothing(
    slot: Slot, image: Path, kind: Kind, eventually: Callable[..., None]
) -> None:
    domu("-n", "u1", *kind.value, "-b", "-d", slot.line(image))
    typed("u1", f"({LOAD} > /dev/null 2>&1 &)")
    eventually(lambda: image.stat().st_blocks > 2048)
    sh("xl destroy u1")


def test_a_guest_destroyed_under_load_disturbs_no_other(
    best_slot: Slot, make_image: Callable[..., Path], eventually: Callable[..., None]
) -> None:
    """Two guests with two disks each; all four are under fio while one of the guests dies."""
    images = [make_image(f"{number}.img") for number in range(4)]
    for guest, (first, second) in enumerate([images[:2], images[2:]], 1):
        lines = [best_slot.line(first), best_slot.line(second, "xvdb")]
        domu("-n", f"u{guest}", "-m", "200", "-b", "-d", lines[0], "-d", lines[1])
    for disk in "ab":
        typed("u1", f"({LOAD.replace('xvda', f'xvd{disk}')} > /dev/null 2>&1 &)")
        loop = f"{VERIFY.replace('xvda', f'xvd{disk}')} --loops=2"
        typed("u2", f"(({loop}; echo $? > /tmp/{disk}.status) > /tmp/{disk}.log 2>&1 &)")
    eventually(lambda: all(image.stat().st_blocks > 2048 for image in images), 60)
    sh("xl destroy u1")
    typed("u2", "while ! [ -e /tmp/a.status -a -e /tmp/b.status ]; do sleep 1; done")
    assert typed("u2", "cat /tmp/?.status").split() == ["0", "0"]
    typed("u2", f"! {COMPLAINTS}")


def test_a_backend_killed_under_load_is_followed_by_another(
    backend: Backend, slot: Slot, image: Path
) -> None:
    """The guest's fio verifies every block over three deaths of its backend, and sees no error."""
    guest = subprocess.Popen(
        ["domu", "-n", "u1", "-d", slot.line(image), f"{VERIFY} --loops=4 && ! {COMPLAINTS}"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    for _ in range(3):
        written = image.stat().st_mtime_ns
        while image.stat().st_mtime_ns == written:
            assert guest.poll() is None, guest.communicate()
        backend.kill()
        backend.start()
    said, _ = guest.communicate(timeout=600)
    assert guest.returncode == 0, said
