# SPDX-License-Identifier: Apache-2.0
"""Operations that go on where the last one ended share a request, each with its own end."""

import errno

import pytest
from rig_front import FrontWorld

from xvd.blkif.abi import Status
from xvd.blkif.messages import Request

READ, WRITE, FLUSH, DISCARD = 0, 1, 3, 5


def ranges(requests: list[object]) -> list[tuple[int, int]]:
    """(first sector, sectors) of each."""
    found = []
    for request in requests:
        assert isinstance(request, Request)
        found.append((request.sector_number, sum(s.sectors for s in request.segments)))
    return found


@pytest.mark.parametrize(
    ("operations", "wanted"),
    [
        ([(0, 8), (8, 8), (16, 8)], [(0, 24)]),
        ([(0, 3), (3, 2), (5, 1)], [(0, 6)]),
        ([(0, 8), (16, 8)], [(0, 8), (16, 8)]),
        ([(8, 8), (0, 8)], [(8, 8), (0, 8)]),
        ([(0, 80), (80, 80)], [(0, 88), (88, 72)]),
        ([(0, 100), (100, 8)], [(0, 88), (88, 20)]),
        ([(i, 1) for i in range(100)], [(0, 88), (88, 12)]),
    ],
)
def test_neighbours_are_joined(
    operations: list[tuple[int, int]], wanted: list[tuple[int, int]]
) -> None:
    data = [bytes([token + 1]) * (size * 512) for token, (_, size) in enumerate(operations)]
    with FrontWorld() as world:
        for token, (first, sectors) in enumerate(operations):
            world.queue.submit(WRITE, first, sectors, data[token], token)
        requests = world.requests()
        assert ranges(list(requests)) == wanted
        assert b"".join(world.data(request) for request in requests) == b"".join(data)
        world.reply(*requests)
        assert world.queue.reap() == [(token, 0) for token in range(len(operations))]


def test_what_is_read_for_many_reaches_each() -> None:
    sizes = [1, 5, 8, 13, 40, 100, 2]
    buffers = [bytearray(size * 512) for size in sizes]
    with FrontWorld() as world:
        at = 0
        for token, size in enumerate(sizes):
            world.queue.submit(READ, at, size, buffers[token], token)
            at += size
        requests = world.requests()
        assert ranges(list(requests)) == [(0, 88), (88, 81)]
        for request in requests:
            for page, segment in enumerate(world.segments(request)):
                sector = request.sector_number + page * 8  # type: ignore[union-attr]
                data = b"".join(bytes([sector + i]) * 512 for i in range(segment.sectors))
                world.grants.write(segment.gref, 0, data)
        world.reply(*requests)
        assert len(world.queue.reap()) == len(sizes)
    whole = b"".join(bytes(buffer) for buffer in buffers)
    assert whole == b"".join(bytes([i]) * 512 for i in range(at))


@pytest.mark.parametrize("between", [FLUSH, DISCARD])
def test_nothing_is_joined_across_another_operation(between: int) -> None:
    with FrontWorld() as world:
        world.queue.submit(WRITE, 0, 8, bytes(4096), 1)
        world.queue.submit(between, 0, 0, None, 2)
        world.queue.submit(WRITE, 8, 8, bytes(4096), 3)
        assert len(world.serve()) == 3
        assert world.queue.counters()["merged"] == 0


def test_reads_and_writes_are_not_joined() -> None:
    with FrontWorld() as world:
        world.queue.submit(WRITE, 0, 8, bytes(4096), 1)
        world.queue.submit(READ, 8, 8, bytearray(4096), 2)
        assert len(world.serve()) == 2


def test_a_failed_request_fails_all_that_were_in_it_and_no_other() -> None:
    with FrontWorld() as world:
        for token, first in enumerate((0, 8, 100)):
            world.queue.submit(WRITE, first, 8, bytes(4096), token)
        joined, alone = world.requests()
        world.answer(joined.id, WRITE, Status.ERROR)
        world.answer(alone.id, WRITE)
        world.push()
        assert world.queue.reap() == [(0, errno.EIO), (1, errno.EIO), (2, 0)]


def test_an_operation_is_over_when_its_last_request_is() -> None:
    """The middle one lies in two requests; it ends with the later answer, in either order."""
    with FrontWorld() as world:
        for token, (first, size) in enumerate(((0, 80), (80, 16), (96, 8))):
            world.queue.submit(WRITE, first, size, bytes(size * 512), token)
        first, second = world.requests()
        world.reply(second)
        assert world.queue.reap() == [(2, 0)]
        world.reply(first)
        assert world.queue.reap() == [(0, 0), (1, 0)]


def test_counters_tell_what_was_joined_and_what_was_split() -> None:
    with FrontWorld() as world:
        for token in range(10):
            world.queue.submit(WRITE, token * 20, 20, bytes(20 * 512), token)
        world.serve()
        counters = world.queue.counters()
        assert (counters["requests"], counters["merged"], counters["split"]) == (3, 9, 2)


@pytest.mark.parametrize("issued", [False, True])
def test_a_queue_that_is_dropped_lets_go_of_all_that_were_joined(issued: bool) -> None:
    buffers = [bytearray(20 * 512) for _ in range(10)]
    with FrontWorld() as world:
        for token, buffer in enumerate(buffers):
            world.queue.submit(READ, token * 20, 20, buffer, token)
        if issued:
            world.requests()
        world.drop_queue()
        for buffer in buffers:
            buffer.append(0)
