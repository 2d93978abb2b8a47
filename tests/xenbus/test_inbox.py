# SPDX-License-Identifier: Apache-2.0
"""What waits for a device is bounded by the kinds of what can happen, not by how often it does."""

from rig_disk import run

from xvd.blkif.handshake import BackendEvent
from xvd.xenbus.inbox import Inbox, Order


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
