# SPDX-License-Identifier: Apache-2.0
"""Linux's frontend with its module parameters swept: it gets what it asks, and data is right."""

from pathlib import Path

import pytest
from xen_host import COMPLAINTS, VERIFY, Backend, Slot, domu, negotiated, report, sh, typed

pytestmark = pytest.mark.usefixtures("guests")

# max_indirect_segments, max_ring_page_order, max_queues, feature_persistent
CASES = [(0, 0, 1, 1), (32, 0, 4, 0), (256, 0, 1, 1), (32, 4, 4, 1)]
"""Linux takes the pages of a full ring at once: 256 segments and order 4 together are 512 MiB."""


@pytest.fixture(scope="module", autouse=True)
def four_queues(backend: Backend) -> None:
    """More than this host has CPUs, which is what is offered otherwise."""
    assert backend.stop() == 0
    backend.start("--set", "max_queues=4")


@pytest.mark.parametrize(("segments", "order", "queues", "persistent"), CASES)
def test_linux_negotiates_what_it_asks_for(
    best_slot: Slot, image: Path, segments: int, order: int, queues: int, persistent: int
) -> None:
    parameters = {
        "max_indirect_segments": segments,
        "max_ring_page_order": order,
        "max_queues": queues,
        "feature_persistent": persistent,
    }
    words = " ".join(f"xen_blkfront.{name}={value}" for name, value in parameters.items())
    domu("-n", "u1", "-m", "512", "-c", "4", "-k", words, "-b", "-d", best_slot.line(image))
    table = {name: front for name, (front, _) in negotiated(int(sh("xl domid u1"))).items()}
    report(f"Linux's frontend asked for {parameters}", negotiated(int(sh("xl domid u1"))))
    assert int(table.get("ring-page-order") or 0) == order
    assert int(table.get("multi-queue-num-queues") or 1) == queues
    assert int(table["feature-persistent"]) == persistent
    largest = int(typed("u1", "cat /sys/block/xvda/queue/max_segments"))
    assert largest == max(segments, 11)
    typed("u1", f"{VERIFY} > /tmp/log 2>&1 && ! {COMPLAINTS}")
