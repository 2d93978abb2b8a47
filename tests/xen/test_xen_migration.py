# SPDX-License-Identifier: Apache-2.0
"""A guest is paused, saved, restored and migrated in the middle of a verifying write loop."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from xen_host import COMPLAINTS, VERIFY, Backend, Slot, negotiated, report, sh, typed

pytestmark = pytest.mark.usefixtures("guests")

LOOP = (
    f"((while [ ! -e /tmp/stop ]; do {VERIFY} --size=4m %s || break; echo round >> /tmp/rounds;"
    " done; echo $? > /tmp/status) > /tmp/log 2>&1 &)"
)

EVERY_FEATURE = ("max_ring_page_order=2", "max_indirect_segments=64", "max_queues=2")
POOR = ("max_ring_page_order=0", "max_indirect_segments=0", "max_queues=1", "feature_persistent=0")
"""What a backend may be set to that is older, or has less memory, than the one before."""

SMALL = "--bsrange=512-40k"
"""Linux's frontend (seen: 6.12) dies in blkif_queue_rq when what was queued before has more
segments than the backend takes afterwards, whoever's backend that is. So nothing has more than the
11 of a direct request, and nothing is merged."""


def rounds() -> int:
    """How often the guest's loop has written and verified its whole range."""
    return int(typed("u1", "cat /tmp/rounds 2> /dev/null | wc -l").split()[-1])


@pytest.fixture
def verifying(
    guests: None, slot: Slot, image: Path, request: pytest.FixtureRequest
) -> Iterator[Callable[[], None]]:
    """A guest in its loop; to be called to let the loop go round, and at the end it is judged."""
    words = " ".join(f"xen_blkfront.{word}" for word in EVERY_FEATURE)
    sh(f"domu -n u1 -m 256 -c 2 -k '{words}' -b -d '{slot.line(image)}'")
    sizes = getattr(request, "param", "")
    if sizes:
        typed("u1", "echo 2 > /sys/block/xvda/queue/nomerges")
    typed("u1", LOOP % sizes)

    def go_on() -> None:
        seen = rounds()
        for _ in itertools.takewhile(lambda _: rounds() < seen + 2, range(300)):
            assert typed("u1", "cat /tmp/status 2> /dev/null || true") == ""
        assert rounds() >= seen + 2, "its loop stands still"

    go_on()
    yield go_on
    typed("u1", "touch /tmp/stop; while [ ! -e /tmp/status ]; do sleep 1; done")
    assert typed("u1", "cat /tmp/status").strip() == "0", typed("u1", "tail -n 20 /tmp/log")
    typed("u1", f"! {COMPLAINTS}")


def test_pause_and_unpause(verifying: Callable[[], None]) -> None:
    for _ in range(3):
        sh("xl pause u1; sleep 0.5; xl unpause u1")
    verifying()


def test_save_and_restore(verifying: Callable[[], None], tmp_path: Path) -> None:
    for _ in range(2):
        before = sh("xl domid u1")
        sh(f"xl save u1 {tmp_path}/saved 2>&1; xl restore {tmp_path}/saved < /dev/null 2>&1")
        (tmp_path / "saved").unlink()
        assert sh("xl domid u1") != before
        verifying()


@pytest.fixture
def log_dirty(xen_version: tuple[int, ...]) -> None:
    """What live migration needs."""
    if xen_version >= (4, 20):
        pytest.skip("Xen 4.20 refuses log-dirty mode in software emulation: save and restore there")


def test_migrate_to_the_same_host(log_dirty: None, verifying: Callable[[], None]) -> None:
    before = sh("xl domid u1")
    sh("xl migrate -s '' u1 'xl migrate-receive' 2>&1")
    assert sh("xl domid u1") != before
    verifying()


@pytest.mark.parametrize("verifying", [SMALL], indirect=True, ids=["small"])
def test_restore_on_a_backend_that_offers_less(
    verifying: Callable[[], None], backend: Backend, tmp_path: Path
) -> None:
    assert "multi-queue-num-queues" in negotiated(int(sh("xl domid u1")))
    sh(f"xl save u1 {tmp_path}/saved 2>&1")
    assert backend.stop() == 0
    backend.start(*(word for setting in POOR for word in ("--set", setting)))
    try:
        sh(f"xl restore {tmp_path}/saved < /dev/null 2>&1")
        table = negotiated(int(sh("xl domid u1")))
        report("Linux's frontend, restored on a backend that offers less", table)
        assert table.get("feature-max-indirect-segments", ("", "0"))[1] == "0"
        assert table["feature-persistent"][1] == "0"
        verifying()
    finally:
        (tmp_path / "saved").unlink()
        assert backend.stop() == 0
        backend.start()
    verifying()
