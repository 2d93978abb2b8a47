# SPDX-License-Identifier: Apache-2.0
"""A frontend's producer index that no ring can have: its device is lost, and only its."""

import pytest
from rig_queue import BROKEN, DRAINED, QueueWorld, rq

from xvd.blkif.abi import Abi, Op, Status

ABIS = pytest.mark.parametrize("abi", list(Abi), ids=lambda abi: abi.name)


@ABIS
@pytest.mark.parametrize("req_prod", [33, 64, 1000, 2**31, 2**32 - 1])
def test_a_producer_too_far_ahead_breaks_the_ring(abi: Abi, req_prod: int) -> None:
    with QueueWorld(abi=abi) as world:
        world.ring_pages.view.cast("I")[0] = req_prod
        assert world.queue.step() == BROKEN | DRAINED
        assert world.responses() == []
        assert world.queue.in_flight == 0


def test_a_producer_that_goes_back_takes_no_more_than_a_ring_full() -> None:
    with QueueWorld() as world:
        world.ask(*(rq(Op.FLUSH_DISKCACHE, id=i) for i in range(8)))
        world.ring_pages.view.cast("I")[0] = 4
        for _ in range(100):
            world.queue.step()
        assert world.queue.broken
        assert world.queue.counters()["requests"] <= 8 + 32
        assert world.queue.in_flight == 0


def test_a_producer_that_runs_ahead_while_requests_are_served() -> None:
    with QueueWorld() as world:
        world.send(*(rq(Op.READ, 0, world.segment(i), id=i) for i in range(8)))
        world.queue.step(4)
        world.ring_pages.view.cast("I")[0] = 4000
        assert world.queue.step() == BROKEN | DRAINED
        assert [answer.status for answer in world.responses()] == [Status.OKAY] * 4


def test_a_full_ring_is_no_lie() -> None:
    with QueueWorld() as world:
        answers = world.ask(*(rq(Op.FLUSH_DISKCACHE, id=i) for i in range(32)))
        assert len(answers) == 32


@pytest.mark.parametrize("rsp_event", [0, 1, 33, 2**31, 2**32 - 1])
def test_any_wish_for_events_is_harmless(rsp_event: int) -> None:
    with QueueWorld() as world:
        world.ring_pages.view.cast("I")[3] = rsp_event
        [answer] = world.ask(rq(Op.FLUSH_DISKCACHE))
        assert answer.status == Status.OKAY


@pytest.mark.parametrize("rsp_prod", [1, 32, 5000, 2**32 - 1])
def test_the_backends_own_index_is_not_read_back(rsp_prod: int) -> None:
    with QueueWorld() as world:
        world.ask(rq(Op.FLUSH_DISKCACHE))
        world.ring_pages.view.cast("I")[2] = rsp_prod
        world.send(rq(Op.FLUSH_DISKCACHE))
        world.settle()
        assert world.ring_pages.view.cast("I")[2] == 2


def test_a_frontend_that_scribbles_over_the_backends_index_is_told_as_if_it_had_not() -> None:
    """What the backend has published it knows by itself: the wish for an event is measured from
    there, not from what now stands on the page."""
    with QueueWorld() as world:
        world.ask(rq(Op.FLUSH_DISKCACHE))
        assert not world.ring.final_check()
        world.send(rq(Op.FLUSH_DISKCACHE))
        world.ring_pages.view.cast("I")[2] = 2  # as if its answer had been published already
        world.settle()
        assert world.queue.counters()["notified"] == 2
