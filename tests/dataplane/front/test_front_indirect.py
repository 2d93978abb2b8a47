# SPDX-License-Identifier: Apache-2.0
"""Requests of more than 11 segments: their descriptors lie in pages of our own."""

import pytest
from rig_front import FrontWorld
from rig_queue import BROKEN, DRAINED

from xvd.blkif.abi import Abi, Op
from xvd.blkif.messages import IndirectRequest, Request, Segment
from xvd.errors import GrantError, LocalProtocolError
from xvd.machine.emulated.limits import Limits

ABIS = pytest.mark.parametrize("abi", list(Abi), ids=lambda abi: abi.name)
READ, WRITE = 0, 1
LARGE = Limits(pages=16384, grefs=8192, tracks=8192, ports=64)


def shape(world: FrontWorld, requests: list[object]) -> list[tuple[str, int, int, int]]:
    """(kind, first sector, sectors, segments) of each."""
    found = []
    for request in requests:
        assert isinstance(request, Request | IndirectRequest)
        segments = world.segments(request)
        sectors = sum(segment.sectors for segment in segments)
        kind = "direct" if isinstance(request, Request) else "indirect"
        found.append((kind, request.sector_number, sectors, len(segments)))
    return found


@pytest.mark.parametrize(
    ("sectors", "wanted"),
    [
        (88, [("direct", 5, 88, 11)]),
        (89, [("indirect", 5, 89, 12)]),
        (256, [("indirect", 5, 256, 32)]),
        (257, [("indirect", 5, 256, 32), ("direct", 261, 1, 1)]),
        (512, [("indirect", 5, 256, 32), ("indirect", 261, 256, 32)]),
    ],
)
def test_only_what_does_not_fit_the_slot_is_indirect(sectors: int, wanted: list[object]) -> None:
    with FrontWorld(segments_max=32) as world:
        world.queue.submit(READ, 5, sectors, bytearray(sectors * 512), 1)
        requests = world.requests()
        assert shape(world, list(requests)) == wanted
        world.reply(*requests)
        assert world.queue.reap() == [(1, 0)]


@ABIS
@pytest.mark.parametrize("segments", [12, 32, 256, 512, 513, 1024, 4096])
def test_data_of_any_length_arrives_and_comes_back(abi: Abi, segments: int) -> None:
    data = bytes(i * 7 % 251 for i in range(segments * 4096))
    buffer = bytearray(len(data))
    with FrontWorld(abi=abi, segments_max=segments, pool=segments + 8, limits=LARGE) as world:
        world.queue.submit(WRITE, 0, segments * 8, data, 1)
        [write] = world.requests()
        assert isinstance(write, IndirectRequest)
        assert (write.nr_segments, write.handle) == (segments, 0xCA00)
        assert world.data(write) == data
        world.reply(write)
        world.queue.submit(READ, 0, segments * 8, buffer, 2)
        [read] = world.requests()
        world.fill(read, data)
        world.reply(read)
        assert world.queue.reap() == [(1, 0), (2, 0)]
    assert buffer == data


@pytest.mark.beyond_xen("lasting")
def test_the_backend_may_only_read_the_descriptors() -> None:
    with FrontWorld(segments_max=32) as world:
        world.queue.submit(READ, 0, 256, bytearray(256 * 512), 1)
        [request] = world.requests()
        assert isinstance(request, IndirectRequest)
        with pytest.raises(GrantError):
            world.grants.write(request.indirect_grefs[0], 0, b"x")
        world.reply(request)


def test_the_padding_of_the_descriptors_holds_nothing() -> None:
    """What lay in the page before does not show between the fields (XSA-403)."""
    with FrontWorld(segments_max=32, pool=33) as world:
        world.queue.submit(WRITE, 0, 256, b"\xee" * 256 * 512, 1)
        world.serve()
        world.queue.submit(READ, 0, 256, bytearray(256 * 512), 2)
        [request] = world.requests()
        assert isinstance(request, IndirectRequest)
        descriptors = bytes(world.page(request.indirect_grefs[0]))
        assert {descriptors[i * 8 + 6 : i * 8 + 8] for i in range(32)} == {b"\0\0"}
        world.reply(request)


@pytest.mark.parametrize("operation", [READ, Op.INDIRECT])
def test_either_operation_may_be_named_in_the_answer(operation: int) -> None:
    with FrontWorld(segments_max=32) as world:
        world.queue.submit(READ, 0, 256, bytearray(256 * 512), 1)
        [request] = world.requests()
        world.answer(request.id, operation)
        world.push()
        assert world.queue.reap() == [(1, 0)]


@pytest.mark.parametrize(("sectors", "operation"), [(256, WRITE), (8, Op.INDIRECT)])
def test_no_other_operation_may_be_named(sectors: int, operation: int) -> None:
    with FrontWorld(segments_max=32) as world:
        world.queue.submit(READ, 0, sectors, bytearray(sectors * 512), 1)
        [request] = world.requests()
        world.answer(request.id, operation)
        assert world.push() == BROKEN | DRAINED
        assert world.queue.breach == "wrong_operation"


@pytest.mark.beyond_xen("lasting")
def test_descriptors_still_mapped_after_the_answer() -> None:
    """XSA-396 holds for them too."""
    with FrontWorld(segments_max=32) as world:
        world.queue.submit(READ, 0, 256, bytearray(256 * 512), 1)
        [request] = world.requests()
        assert isinstance(request, IndirectRequest)
        held = world.grants.map(list(request.indirect_grefs), writable=False)
        assert world.reply(request) == BROKEN | DRAINED
        assert world.queue.breach == "grant_still_mapped"
        held.close()


def test_a_pool_smaller_than_the_ring_is_waited_for() -> None:
    """40 pages are one request of 32 and its descriptors, and a small one; then they come back."""
    with FrontWorld(segments_max=32, pool=40) as world:
        for token in range(3):
            world.queue.submit(READ, token * 1000, 256, bytearray(256 * 512), token)
            world.queue.submit(READ, token * 1000 + 500, 8, bytearray(8 * 512), token + 10)
        for turn in range(3):
            requests = world.requests()
            assert len(requests) == 2
            world.reply(*reversed(requests))
            assert world.queue.reap() == [(turn + 10, 0), (turn, 0)]


def test_every_page_comes_back() -> None:
    with FrontWorld(segments_max=32, pool=40) as world:
        for token in range(20):
            world.queue.submit(READ, token * 1000, 256, bytearray(256 * 512), token)
        assert len(world.serve()) == 20
        counters = world.queue.counters()
        assert (counters["granted"], counters["revoked"]) == (20 * 33, 20 * 33)
        assert counters["indirect"] == 20


@pytest.mark.parametrize(("segments_max", "pool"), [(12, 12), (512, 512), (513, 514)])
def test_a_pool_too_small_for_one_request(segments_max: int, pool: int) -> None:
    with pytest.raises(LocalProtocolError, match=f"{pool} pages are too few for {segments_max}"):
        FrontWorld(segments_max=segments_max, pool=pool)


def test_segments_are_whole_blocks_of_the_backend() -> None:
    """With 4096-byte blocks a request ends on one, however many segments it could have."""
    with FrontWorld(segments_max=11, block_sectors=16) as world:
        world.queue.submit(READ, 0, 160, bytearray(160 * 512), 1)
        requests = world.requests()
        assert shape(world, list(requests)) == [("direct", 0, 80, 10), ("direct", 80, 80, 10)]
        world.reply(*requests)


def test_segments_name_whole_pages_but_the_last() -> None:
    with FrontWorld(segments_max=32) as world:
        world.queue.submit(READ, 0, 93, bytearray(93 * 512), 1)
        [request] = world.requests()
        *whole, last = world.segments(request)
        assert {(s.first_sect, s.last_sect) for s in whole} == {(0, 7)}
        assert last == Segment(last.gref, 0, 4)
        world.reply(request)
