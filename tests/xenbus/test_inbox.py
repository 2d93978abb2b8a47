# SPDX-License-Identifier: Apache-2.0
"""What waits for a device is bounded by the kinds of what can happen, not by how often it does; and
readings of nodes are free until there are too many of them."""

import pytest
from rig_disk import run

from xvd.blkif.handshake import BackendEvent
from xvd.xenbus.inbox import READS_FREE, READS_PER_SECOND, Inbox, Order, Pace


def test_everything_waits_once_and_in_the_order_in_which_it_came() -> None:
    async def work() -> None:
        inbox: Inbox[BackendEvent] = Inbox()
        inbox.put(BackendEvent.STORAGE_READY)
        for _ in range(1000):
            inbox.put(Order.POLL)
            inbox.put(BackendEvent.RESIZED)
        assert len(inbox) == 3
        found = [await inbox.get() for _ in range(3)]
        assert found == [BackendEvent.STORAGE_READY, Order.POLL, BackendEvent.RESIZED]

    run(work())


def test_what_comes_while_its_like_is_acted_on_waits_again() -> None:
    async def work() -> None:
        inbox: Inbox[BackendEvent] = Inbox()
        inbox.put(Order.POLL)
        assert await inbox.get() is Order.POLL
        inbox.put(Order.POLL)
        assert len(inbox) == 1

    run(work())


class Clock:
    now = 5.0

    def __call__(self) -> float:
        return self.now


def test_a_life_cycles_looks_wait_for_nothing() -> None:
    pace = Pace(Clock())

    assert [pace.wait_s() for _ in range(READS_FREE)] == [0.0] * READS_FREE


def test_a_storm_is_looked_at_so_often_in_a_second() -> None:
    clock = Clock()
    pace = Pace(clock)
    reads, end = 0, clock.now + 10

    while clock.now < end:
        clock.now += pace.wait_s()
        reads += 1

    assert reads == pytest.approx(READS_FREE + 10 * READS_PER_SECOND, abs=2)


def test_after_a_quiet_second_looks_are_free_again() -> None:
    clock = Clock()
    pace = Pace(clock)
    for _ in range(READS_FREE + 1):
        clock.now += pace.wait_s()

    clock.now += 1.0

    assert [pace.wait_s() for _ in range(40)] == [0.0] * 40
