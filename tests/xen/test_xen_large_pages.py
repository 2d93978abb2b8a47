# SPDX-License-Identifier: Apache-2.0
"""Guests of Linux with pages of 16 and 64 KiB, and what is different for them at the ring.

They exist on ARM64 only: `make xen SUITE=arm64`. Linux 6.12 with pages of 64 KiB gets no disk where
there are no indirect requests, from any backend (docs/xen.md), so 6.1 is the one that splits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from xen_host import (
    COMPLAINTS,
    ON_ARM,
    VERIFY,
    Backend,
    Kind,
    Slot,
    counter,
    domu,
    negotiated,
    report,
    sh,
    typed,
)

pytestmark = [
    pytest.mark.usefixtures("guests"),
    pytest.mark.skipif(not ON_ARM, reason="Linux on x86 has pages of 4 KiB only"),
]

PAGES = {Kind.PAGES_16K: 16, Kind.PAGES_64K: 64, Kind.PAGES_64K_LINUX_6_1: 64}
"""KiB."""

SPLITTING = Kind.PAGES_64K_LINUX_6_1
CHUNKS = 32
TRANSFERS = [
    ("rd_req", "if=/dev/xvda of=/dev/null iflag=direct"),
    ("wr_req", "if=/dev/zero of=/dev/xvda oflag=direct"),
]
"""What counts them, and what dd is told."""


@dataclass(frozen=True)
class Wish:
    """What a guest is told to ask for: parameters of Linux's frontend."""

    kind: Kind
    max_indirect_segments: int = 32
    max_ring_page_order: int = 0
    max_queues: int = 1
    feature_persistent: int = 1

    def __str__(self) -> str:
        asked = (self.max_indirect_segments, self.max_ring_page_order, self.max_queues)
        kept = "persistent" if self.feature_persistent else "copied"
        return "-".join([self.kind.name.lower(), *map(str, asked), kept])

    def boot(self, line: str, memory: int = 512) -> int:
        """Boot a guest that stays, u1, with a shell on its console; its domain."""
        names = ("max_indirect_segments", "max_ring_page_order", "max_queues", "feature_persistent")
        words = " ".join(f"xen_blkfront.{name}={getattr(self, name)}" for name in names)
        size = ("-n", "u1", "-m", str(memory), "-c", "2")
        domu(*size, *self.kind.value, "-k", words, "-b", "-d", line)
        return int(sh("xl domid u1"))


WISHES = [
    Wish(Kind.PAGES_16K),
    Wish(Kind.PAGES_16K, max_indirect_segments=0, max_ring_page_order=2, feature_persistent=0),
    Wish(Kind.PAGES_64K),
    Wish(Kind.PAGES_64K, max_indirect_segments=256, max_queues=2, feature_persistent=0),
    Wish(SPLITTING),
    Wish(SPLITTING, max_indirect_segments=0),
    Wish(SPLITTING, max_indirect_segments=0, feature_persistent=0),
    Wish(SPLITTING, max_indirect_segments=0, max_ring_page_order=2, max_queues=2),
]


@pytest.mark.parametrize("wish", WISHES, ids=str)
def test_a_guest_gets_what_it_asks_for_and_verifies(
    best_slot: Slot, image: Path, wish: Wish
) -> None:
    domid = wish.boot(best_slot.line(image))
    table = negotiated(domid)
    report(f"{wish.kind.name} asked for {wish}", table)
    front = {name: frontend for name, (frontend, _) in table.items()}
    assert int(front.get("ring-page-order") or 0) == wish.max_ring_page_order
    assert int(front.get("multi-queue-num-queues") or 1) == wish.max_queues
    assert int(front["feature-persistent"]) == wish.feature_persistent
    page = typed("u1", "sed -n 's/KernelPageSize: *//p' /proc/self/smaps | head -n 1")
    assert page.split() == [str(PAGES[wish.kind]), "kB"]
    typed("u1", f"{VERIFY} > /tmp/log 2>&1 && ! {COMPLAINTS}")


@pytest.fixture
def offers_no_indirect(backend: Backend) -> Iterator[None]:
    assert backend.stop() == 0
    backend.start("--set", "max_indirect_segments=0")
    yield
    assert backend.stop() == 0
    backend.start()


@pytest.mark.usefixtures("offers_no_indirect")
@pytest.mark.parametrize("kind", [Kind.PAGES_16K, SPLITTING], ids=lambda kind: kind.name.lower())
def test_a_guest_verifies_where_the_backend_takes_no_indirect_requests(
    best_slot: Slot, image: Path, kind: Kind
) -> None:
    domu(*kind.value, "-d", best_slot.line(image), f"{VERIFY} && ! {COMPLAINTS}")


@pytest.mark.parametrize(("segments", "slots"), [(0, 2), (32, 1)])
@pytest.mark.parametrize(("name", "files"), TRANSFERS)
def test_a_page_of_64_kib_takes_two_slots_where_a_request_has_eleven_segments(
    best_slot: Slot, image: Path, segments: int, slots: int, name: str, files: str
) -> None:
    domid = Wish(SPLITTING, max_indirect_segments=segments).boot(best_slot.line(image))
    before = counter(domid, name)
    typed("u1", f"dd {files} bs=64k count={CHUNKS} 2>&1")
    assert counter(domid, name) - before == slots * CHUNKS
