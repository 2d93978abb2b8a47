# SPDX-License-Identifier: Apache-2.0
"""A backend that answers what was not asked: the frontend's device breaks, and says how."""

from collections.abc import Callable

import pytest
from rig_front import FrontWorld
from rig_queue import BROKEN, DRAINED

from xvd.blkif.abi import Abi
from xvd.blkif.messages import Request

READ, WRITE, FLUSH = 0, 1, 3
ABIS = pytest.mark.parametrize("abi", list(Abi), ids=lambda abi: abi.name)


def one_outstanding(world: FrontWorld) -> int:
    """A flush on the ring; its id."""
    world.queue.submit(FLUSH, 0, 0, None, 1)
    [request] = world.requests()
    return request.id


@pytest.mark.parametrize("rsp_prod", [2, 33, 1000, 2**31, 2**32 - 1])
def test_more_responses_than_requests(rsp_prod: int) -> None:
    with FrontWorld() as world:
        one_outstanding(world)
        world.mapping.view.cast("I")[2] = rsp_prod
        assert world.queue.step() == BROKEN | DRAINED
        assert world.queue.breach == "response_overflow"
        assert world.queue.reap() == []


@ABIS
@pytest.mark.parametrize("id", [32, 33, 2**31, 2**32, 2**63, 2**64 - 1])
def test_an_id_that_is_no_slot(abi: Abi, id: int) -> None:
    with FrontWorld(abi=abi) as world:
        one_outstanding(world)
        world.answer(id, FLUSH)
        assert world.push() == BROKEN | DRAINED
        assert world.queue.breach == "unknown_id"


def test_an_id_that_is_not_outstanding() -> None:
    with FrontWorld() as world:
        id = one_outstanding(world)
        world.answer((id + 1) % 32, FLUSH)
        assert world.push() == BROKEN | DRAINED
        assert world.queue.breach == "not_in_flight"


def test_the_same_response_twice() -> None:
    with FrontWorld() as world:
        for token in (1, 2):
            world.queue.submit(FLUSH, 0, 0, None, token)
        first, _ = world.requests()
        world.answer(first.id, FLUSH)
        world.answer(first.id, FLUSH)
        assert world.push() == BROKEN | DRAINED
        assert world.queue.breach == "not_in_flight"
        assert world.queue.reap() == [(1, 0)]


@pytest.mark.parametrize("operation", [READ, WRITE, 2, 4, 5, 6, 255])
def test_another_operation_than_was_asked(operation: int) -> None:
    with FrontWorld() as world:
        id = one_outstanding(world)
        world.answer(id, operation)
        assert world.push() == BROKEN | DRAINED
        assert world.queue.breach == "wrong_operation"


@pytest.mark.beyond_xen("lasting")
def test_a_page_still_mapped_after_its_response() -> None:
    """XSA-396: such a page can be neither reused nor freed."""
    with FrontWorld() as world:
        world.queue.submit(WRITE, 0, 8, bytes(4096), 1)
        [request] = world.requests()
        assert isinstance(request, Request)
        held = world.grants.map([request.segments[0].gref], writable=False)
        world.answer(request.id, WRITE)
        assert world.push() == BROKEN | DRAINED
        assert world.queue.breach == "grant_still_mapped"
        held.close()


def rewrite_slots(world: FrontWorld) -> None:
    world.mapping.view[64:] = b"\xff" * 4032


def rewrite_header(world: FrontWorld) -> None:
    world.mapping.view[0:8] = b"\xff" * 8


@pytest.mark.parametrize("rewrite", [rewrite_slots, rewrite_header])
def test_the_frontend_reads_nothing_back(rewrite: Callable[[FrontWorld], None]) -> None:
    buffer = bytearray(512)
    with FrontWorld() as world:
        world.queue.submit(READ, 0, 1, buffer, 1)
        [request] = world.requests()
        rewrite(world)
        world.answer(request.id, READ)
        world.push()
        assert world.queue.reap() == [(1, 0)]
        assert world.queue.breach is None


def test_a_broken_queue_stays_broken() -> None:
    with FrontWorld() as world:
        one_outstanding(world)
        world.answer(99, FLUSH)
        world.push()
        world.queue.submit(FLUSH, 0, 0, None, 2)
        assert world.queue.step() == BROKEN | DRAINED
        assert world.queue.in_flight == 1


def test_a_backend_that_scribbles_over_the_frontends_index_is_told_as_if_it_had_not() -> None:
    """What the frontend has published it knows by itself: see ring.pxd."""
    with FrontWorld() as world:
        world.queue.submit(FLUSH, 0, 0, None, 1)
        [request] = world.requests()
        world.answer(request.id, FLUSH)
        world.push()
        assert not world.ring.final_check()
        world.queue.submit(FLUSH, 0, 0, None, 2)
        world.mapping.view.cast("I")[0] = 2  # as if the second request had been published already
        world.requests()
        assert world.queue.counters()["notified"] == 2
