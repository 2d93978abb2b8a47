# SPDX-License-Identifier: Apache-2.0
"""Persistent grants: a page is granted once and used again, as long as the backend keeps it."""

import pytest
from rig_front import FrontWorld

from xvd.blkif.messages import AnyRequest, IndirectRequest
from xvd.types import Gref

READ, WRITE = 0, 1
PERMIT, READONLY, READING, WRITING = 1, 4, 8, 16


def keeping(segments_max: int = 11, pool: int = 64) -> FrontWorld:
    return FrontWorld(segments_max=segments_max, pool=pool, persistent=True, keeping=True)


def grefs(world: FrontWorld, request: AnyRequest) -> list[Gref]:
    return [segment.gref for segment in world.segments(request)]


def flags(world: FrontWorld, gref: Gref) -> int:
    return world.guest.state(world.guest.domid).entry(gref)[0]


def one_write(world: FrontWorld, sectors: int, data: bytes = b"") -> AnyRequest:
    """Write, let the backend map, and have it answered."""
    world.queue.submit(WRITE, 0, sectors, data or bytes(sectors * 512), 1)
    [request] = world.serve()
    world.queue.reap()
    return request


@pytest.mark.beyond_xen("lasting")
def test_a_page_is_granted_once_and_reused() -> None:
    with keeping() as world:
        first = grefs(world, one_write(world, 24))
        for _ in range(9):
            assert sorted(grefs(world, one_write(world, 24))) == sorted(first)
        counters = world.queue.counters()
        assert (counters["granted"], counters["reused"], counters["revoked"]) == (3, 27, 0)


@pytest.mark.beyond_xen("lasting")
def test_a_persistent_grant_is_writable_whatever_it_is_first_used_for() -> None:
    with keeping() as world:
        [gref] = grefs(world, one_write(world, 8))
        assert flags(world, gref) & READONLY == 0


@pytest.mark.parametrize("segments_max", [11, 32])
def test_data_goes_both_ways_through_the_same_pages(segments_max: int) -> None:
    data = bytes(i % 253 for i in range(100 * 512))
    buffer = bytearray(len(data))
    with keeping(segments_max) as world:
        for turn in range(5):
            world.queue.submit(WRITE, 0, 100, data, turn)
            writes = world.requests()
            assert b"".join(world.data(request) for request in writes) == data
            world.reply(*writes)
            world.queue.submit(READ, 0, 100, buffer, turn)
            world.serve(b"wxyz")
            assert buffer == (b"wxyz" * len(data))[: len(data)]
        assert world.queue.counters()["granted"] <= 14


def test_the_hot_pages_stay_hot() -> None:
    """Last in, first out: one request at a time uses one page, and the others grow cold."""
    with keeping() as world:
        world.queue.submit(WRITE, 0, 88, bytes(88 * 512), 1)
        world.serve()
        assert len({tuple(grefs(world, one_write(world, 8))) for _ in range(20)}) == 1


@pytest.mark.beyond_xen("lasting")
def test_a_page_that_the_backend_did_not_keep_is_granted_again() -> None:
    """It maps what is above its limit for one request only; the page then goes last."""
    with keeping() as world:
        [gref] = grefs(world, one_write(world, 8))
        world.queue.submit(WRITE, 0, 8, bytes(4096), 2)
        [request] = world.requests()
        world.let_go(gref)
        world.reply(request)
        assert flags(world, gref) == 0
        [other] = grefs(world, one_write(world, 8))
        assert other != gref
        counters = world.queue.counters()
        assert (counters["granted"], counters["revoked"], counters["reused"]) == (2, 1, 1)


@pytest.mark.beyond_xen("lasting")
def test_a_backend_that_keeps_nothing_costs_what_it_cost_before() -> None:
    with FrontWorld(pool=64, persistent=True) as world:
        for _ in range(5):
            one_write(world, 16)
        counters = world.queue.counters()
        assert (counters["granted"], counters["revoked"], counters["reused"]) == (10, 10, 0)


@pytest.mark.beyond_xen("lasting")
def test_a_scan_ends_the_grants_that_the_backend_has_dropped() -> None:
    """It forgets what it has not used for a minute, and says nothing (Linux 4b422cb9)."""
    with keeping() as world:
        held = grefs(world, one_write(world, 64))
        world.let_go(*held[:5])
        assert [flags(world, gref) & PERMIT for gref in held] == [1] * 8
        world.queue.scan()
        world.queue.step()
        assert [flags(world, gref) & PERMIT for gref in held] == [0] * 5 + [1] * 3
        one_write(world, 64)
        assert world.queue.counters()["granted"] == 8 + 5


@pytest.mark.beyond_xen("lasting")
def test_a_scan_leaves_alone_what_is_in_flight() -> None:
    with keeping() as world:
        world.queue.submit(WRITE, 0, 8, bytes(4096), 1)
        [request] = world.requests()
        world.queue.scan()
        world.queue.step()
        [gref] = grefs(world, request)
        assert flags(world, gref) == PERMIT
        world.reply(request)


def test_a_scan_without_persistent_grants_does_nothing() -> None:
    with FrontWorld() as world:
        one_write(world, 8)
        world.queue.scan()
        world.queue.step()
        assert world.queue.counters()["revoked"] == 1


@pytest.mark.beyond_xen("lasting")
def test_pages_of_descriptors_are_persistent_too() -> None:
    with keeping(32) as world:
        first = one_write(world, 256)
        assert isinstance(first, IndirectRequest)
        assert flags(world, first.indirect_grefs[0]) & (READONLY | WRITING) == WRITING
        one_write(world, 256)
        counters = world.queue.counters()
        assert (counters["granted"], counters["reused"]) == (33, 33)


def test_a_persistent_page_still_mapped_is_no_breach() -> None:
    with keeping() as world:
        one_write(world, 8)
        assert world.queue.breach is None


def test_pages_begin_empty() -> None:
    """Nothing of a former use of the memory can be seen in them (XSA-403)."""
    with keeping() as world:
        world.queue.submit(READ, 0, 88, bytearray(88 * 512), 1)
        [request] = world.requests()
        assert not any(world.data(request))
        world.reply(request)
