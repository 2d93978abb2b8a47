# SPDX-License-Identifier: Apache-2.0
"""A guest is paused, saved, restored and migrated in the middle of a verifying write loop."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from xen_host import COMPLAINTS, ON_ARM, VERIFY, Backend, Slot, negotiated, report, sh, typed

pytestmark = pytest.mark.usefixtures("guests")
saves = pytest.mark.skipif(ON_ARM, reason="Xen on ARM can neither save nor migrate a domain")

LOOP = (
    f"((while [ ! -e /tmp/stop ]; do {VERIFY} --size=4m %s || break; echo round >> /tmp/rounds;"
    " done; echo $? > /tmp/status) > /tmp/log 2>&1 &)"
)

EVERY_FEATURE = ("max_ring_page_order=2", "max_indirect_segments=64", "max_queues=2")
POOR = ("max_ring_page_order=0", "max_queues=1", "feature_persistent=0")
"""What a backend may be set to that is older, or has less memory, than the one before."""

POORER = (*POOR, "max_indirect_segments=0")

SMALL = "--bsrange=512-40k"
"""Requests of the 11 segments that every backend takes, with merging off.

What is in flight Linux's frontend splits anew, but what its block layer has queued stays as it is;
blkif_queue_rw_req has a BUG_ON for one with more segments than the backend takes now, whoever's
backend that is (seen with 6.12). So a guest may lose its indirect descriptors only if it had no use
for them.
"""


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


@saves
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


@saves
def test_migrate_to_the_same_host(log_dirty: None, verifying: Callable[[], None]) -> None:
    before = sh("xl domid u1")
    sh("xl migrate -s '' u1 'xl migrate-receive' 2>&1")
    assert sh("xl domid u1") != before
    verifying()


@saves
@pytest.mark.parametrize(
    ("verifying", "settings"),
    [("", POOR), (SMALL, POORER)],
    indirect=["verifying"],
    ids=["any size", "no indirect"],
)
def test_restore_on_a_backend_that_offers_less(
    verifying: Callable[[], None], settings: tuple[str, ...], backend: Backend, tmp_path: Path
) -> None:
    assert "multi-queue-num-queues" in negotiated(int(sh("xl domid u1")))
    sh(f"xl save u1 {tmp_path}/saved 2>&1")
    assert backend.stop() == 0
    backend.start(*(word for setting in settings for word in ("--set", setting)))
    try:
        sh(f"xl restore {tmp_path}/saved < /dev/null 2>&1")
        table = negotiated(int(sh("xl domid u1")))
        report("Linux's frontend, restored on a backend that offers less", table)
        assert table["feature-persistent"][1] == "0"
        assert not table.keys() & {"ring-page-order", "multi-queue-num-queues"}
        indirect = table.get("feature-max-indirect-segments", ("", "0"))[1]
        assert int(indirect) == (0 if settings is POORER else 256)
        verifying()
    finally:
        (tmp_path / "saved").unlink()
        assert backend.stop() == 0
        backend.start()
    verifying()
