# SPDX-License-Identifier: Apache-2.0
"""A frontend queue, stepped by hand: how operations become requests and how answers end them."""

import errno
import gc

import pytest
from rig_front import FrontWorld
from rig_queue import DRAINED

from xvd.blkif.abi import Abi, Op, Status
from xvd.blkif.messages import DiscardRequest, Request
from xvd.dataplane.front.options import FrontOptions
from xvd.errors import LocalProtocolError

ABIS = pytest.mark.parametrize("abi", list(Abi), ids=lambda abi: abi.name)
READ, WRITE, FLUSH, DISCARD = 0, 1, 3, 5


def shapes(requests: list[object]) -> list[tuple[int, int, int]]:
    """(first sector, sectors, segments) of each."""
    found = []
    for request in requests:
        assert isinstance(request, Request)
        sectors = sum(segment.sectors for segment in request.segments)
        found.append((request.sector_number, sectors, request.nr_segments))
    return found


@pytest.mark.parametrize(
    ("sectors", "wanted"),
    [
        (1, [(5, 1, 1)]),
        (8, [(5, 8, 1)]),
        (9, [(5, 9, 2)]),
        (87, [(5, 87, 11)]),
        (88, [(5, 88, 11)]),
        (89, [(5, 88, 11), (93, 1, 1)]),
        (176, [(5, 88, 11), (93, 88, 11)]),
        (181, [(5, 88, 11), (93, 88, 11), (181, 5, 1)]),
    ],
)
def test_an_operation_is_split_at_44_kib(sectors: int, wanted: list[object]) -> None:
    with FrontWorld() as world:
        world.queue.submit(READ, 5, sectors, bytearray(sectors * 512), 1)
        assert shapes(world.serve()) == wanted
        assert world.queue.reap() == [(1, 0)]


def test_fewer_segments_make_smaller_requests() -> None:
    with FrontWorld(segments_max=2) as world:
        world.queue.submit(READ, 0, 33, bytearray(33 * 512), 1)
        assert shapes(world.serve()) == [(0, 16, 2), (16, 16, 2), (32, 1, 1)]


@ABIS
def test_data_that_is_written_lies_in_the_pages_granted(abi: Abi) -> None:
    data = bytes(range(256)) * 18
    with FrontWorld(abi=abi) as world:
        world.queue.submit(WRITE, 0, 9, data, 1)
        [request] = world.requests()
        assert isinstance(request, Request)
        parts = [world.grants.read(s.gref, 0, s.sectors * 512) for s in request.segments]
        world.answer(request.id, WRITE)
        world.push()
        assert b"".join(parts) == data
        assert request.handle == 0xCA00


@pytest.mark.beyond_xen("lasting")
def test_a_page_that_is_written_from_is_granted_read_only() -> None:
    with FrontWorld() as world:
        world.queue.submit(WRITE, 0, 1, bytes(512), 1)
        [request] = world.requests()
        assert isinstance(request, Request)
        state = world.guest.state(world.guest.domid)
        assert state.entry(request.segments[0].gref)[0] == 1 | 4
        world.answer(request.id, WRITE)
        world.push()


@ABIS
def test_data_that_is_read_reaches_the_callers_buffer(abi: Abi) -> None:
    buffer = bytearray(100 * 512)
    with FrontWorld(abi=abi) as world:
        world.queue.submit(READ, 0, 100, buffer, 7)
        world.serve(b"ab")
        assert world.queue.reap() == [(7, 0)]
    assert bytes(buffer) == b"ab" * 25600


def test_answers_may_come_in_any_order() -> None:
    with FrontWorld() as world:
        for token in range(4):
            world.queue.submit(FLUSH, 0, 0, None, token)
        for request in reversed(world.requests()):
            world.answer(request.id, FLUSH)
        world.push()
        assert world.queue.reap() == [(3, 0), (2, 0), (1, 0), (0, 0)]


@pytest.mark.parametrize(
    ("statuses", "outcome"),
    [
        ([0, 0], 0),
        ([0, Status.ERROR], errno.EIO),
        ([Status.EOPNOTSUPP, 0], errno.EOPNOTSUPP),
        ([Status.EOPNOTSUPP, Status.ERROR], errno.EIO),
        ([Status.ERROR, Status.EOPNOTSUPP], errno.EIO),
        ([-5, 0], errno.EIO),
        ([1, 0], errno.EIO),
        ([32767, -32768], errno.EIO),
    ],
)
def test_the_worst_part_is_the_outcome_of_the_whole(statuses: list[int], outcome: int) -> None:
    """A status that blkif.h does not have (NetBSD sends its errno) is an error."""
    with FrontWorld() as world:
        world.queue.submit(WRITE, 0, 100, bytes(51200), 1)
        for request, status in zip(world.requests(), statuses, strict=True):
            world.answer(request.id, WRITE, status)
        world.push()
        assert world.queue.reap() == [(1, outcome)]


def test_a_failed_read_leaves_the_buffer_alone() -> None:
    buffer = bytearray(b"u" * 512)
    with FrontWorld() as world:
        world.queue.submit(READ, 0, 1, buffer, 1)
        [request] = world.requests()
        world.answer(request.id, READ, Status.ERROR)
        world.push()
    assert bytes(buffer) == b"u" * 512


def test_a_discard_of_any_length_is_one_request() -> None:
    with FrontWorld() as world:
        world.queue.submit(DISCARD, 3, 2**40, None, 1)
        [request] = world.serve()
        assert request == DiscardRequest(request.id, 3, 2**40, 0, 0xCA00)


def test_a_long_operation_waits_for_slots_and_goes_on() -> None:
    with FrontWorld() as world:
        world.queue.submit(WRITE, 0, 88 * 100, bytes(88 * 100 * 512), 1)
        world.queue.submit(FLUSH, 0, 0, None, 2)
        first = world.requests() + world.requests()  # a step takes so many pages
        assert len(first) == 32
        for request in first:
            world.answer(request.id, WRITE)
        world.push()
        rest = world.serve()
        assert (len(rest), getattr(rest[-1], "operation", None)) == (69, Op.FLUSH_DISKCACHE)
        assert world.queue.reap() == [(1, 0), (2, 0)]


def test_the_bell_rings_once_for_all_that_is_done() -> None:
    import os

    with FrontWorld() as world:
        for token in range(3):
            world.queue.submit(FLUSH, 0, 0, None, token)
        world.serve()
        assert os.eventfd_read(world.queue.done_fd) == 1
        assert len(world.queue.reap()) == 3


def test_submit_says_whether_the_thread_must_be_woken() -> None:
    with FrontWorld() as world:
        assert [world.queue.submit(FLUSH, 0, 0, None, i) for i in range(3)] == [True, False, False]
        world.serve()
        assert world.queue.submit(FLUSH, 0, 0, None, 3)
        world.serve()


@pytest.mark.parametrize(
    ("operation", "sectors", "buffer", "text"),
    [
        (4, 1, b"", "none of read, write, barrier, flush"),
        (6, 1, b"", "none of read, write, barrier, flush"),
        (0, 0, bytearray(), "at least one sector"),
        (1, 2, bytes(512), "512 bytes for 2 sectors"),
        (0, 1, bytearray(513), "513 bytes for 1 sectors"),
    ],
)
def test_operations_that_make_no_sense(
    operation: int, sectors: int, buffer: bytes, text: str
) -> None:
    with FrontWorld() as world, pytest.raises(LocalProtocolError, match=text):
        world.queue.submit(operation, 0, sectors, buffer, 1)


def test_a_read_wants_a_writable_buffer() -> None:
    with FrontWorld() as world, pytest.raises(BufferError):
        world.queue.submit(READ, 0, 1, bytes(512), 1)


def test_a_buffer_is_locked_until_it_is_reaped() -> None:
    buffer = bytearray(512)
    with FrontWorld() as world:
        world.queue.submit(READ, 0, 1, buffer, 1)
        world.serve()
        with pytest.raises(BufferError):
            buffer.append(0)
        world.queue.reap()
        buffer.append(0)


@pytest.mark.parametrize("sectors", [1, 100, 88 * 40])
@pytest.mark.parametrize("steps", [0, 1])
def test_a_queue_that_is_dropped_lets_go_of_every_buffer(sectors: int, steps: int) -> None:
    """Those in flight were forgotten: each reconnect under load kept their memory for ever."""
    buffer = bytearray(sectors * 512)
    with FrontWorld() as world:
        world.queue.submit(READ, 0, sectors, buffer, 1)
        for _ in range(steps):
            world.requests()
        world.drop_queue()
        gc.collect()
        buffer.append(0)


def test_a_stopped_queue_is_drained_when_its_last_answer_came() -> None:
    with FrontWorld() as world:
        world.queue.submit(FLUSH, 0, 0, None, 1)
        [request] = world.requests()
        world.queue.submit(FLUSH, 0, 0, None, 2)
        world.queue.stop()
        assert world.queue.step() == 0
        world.answer(request.id, FLUSH)
        assert world.push() == DRAINED
        assert world.queue.reap() == [(1, 0)]


@pytest.mark.beyond_xen("lasting")
def test_grants_are_taken_back_with_each_answer() -> None:
    with FrontWorld() as world:
        world.queue.submit(WRITE, 0, 88, bytes(45056), 1)
        world.serve()
        counters = world.queue.counters()
        assert (counters["granted"], counters["revoked"], counters["in_flight"]) == (11, 11, 0)
        state = world.guest.state(world.guest.domid)
        assert {state.entry(gref)[0] for gref in world.pages.grefs} == {0}


def test_too_few_pages_for_one_request() -> None:
    with FrontWorld() as world, pytest.raises(LocalProtocolError, match="1 pages are too few for"):
        world.link.prepare(world.ring_pages, FrontOptions())


@pytest.mark.parametrize("segments_max", [0, 4097])
def test_segments_have_bounds(segments_max: int) -> None:
    with FrontWorld() as world, pytest.raises(LocalProtocolError, match="1 to 4096 segments"):
        world.link.prepare(world.pages, FrontOptions(segments_max=segments_max))


# ---- The budget of a step ----


def test_a_step_issues_and_takes_no_more_than_its_budget() -> None:
    with FrontWorld() as world:
        for token in range(4):
            world.queue.submit(Op.READ, token * 64, 8, bytearray(4096), token)
        world.queue.step(3)
        assert world.queue.counters()["requests"] == 3
        world.serve(b"data")
        assert [token for token, _ in world.queue.reap()] == [0, 1, 2, 3]
        for token in range(4):
            world.queue.submit(Op.READ, token * 64, 8, bytearray(4096), token)
        for request in world.requests():
            world.answer(request.id, Op.READ)
        world.ring.push()
        world.queue.step(3)
        assert len(world.queue.reap()) == 3
        world.queue.step(3)
        assert len(world.queue.reap()) == 1


def test_a_step_moves_no_more_pages_than_its_budget() -> None:
    """Sixteen pages for each request: the backend has the first while the rest is copied."""
    with FrontWorld(segments_max=32, pool=264) as world:
        for token in range(4):
            world.queue.submit(Op.WRITE, token * 512, 256, bytes(256 * 512), token)
        world.queue.step(2)
        assert world.queue.counters()["requests"] == 1
        requests = world.requests()
        assert len(requests) == 4
        for request in requests:
            world.answer(request.id, Op.WRITE)
        world.ring.push()
        world.queue.step(2)
        assert len(world.queue.reap()) == 1
        world.queue.step()
        assert len(world.queue.reap()) == 3
