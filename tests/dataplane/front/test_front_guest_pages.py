# SPDX-License-Identifier: Apache-2.0
"""A guest whose pages are of 16 or 64 KiB on a protocol of 4 KiB grants."""

import errno

import pytest
from rig_front import FrontWorld

from xvd.blkif.abi import Status
from xvd.blkif.messages import AnyRequest, IndirectRequest, Request
from xvd.dataplane.front.queue import FrontQueue
from xvd.errors import LocalProtocolError

READ, WRITE, FLUSH = 0, 1, 3


def cut(world: FrontWorld, requests: list[AnyRequest]) -> list[tuple[int, int, int]]:
    """(first sector, sectors, grants) of each."""
    found = []
    for request in requests:
        assert isinstance(request, Request | IndirectRequest)
        segments = world.segments(request)
        sectors = sum(segment.sectors for segment in segments)
        found.append((request.sector_number, sectors, len(segments)))
    return found


@pytest.mark.parametrize(
    ("page_grants", "segments_max", "sectors", "wanted"),
    [
        # Without descriptors a page of 64 KiB is two linked requests, the second at + 88.
        (16, 11, 128, [(0, 88, 11), (88, 40, 5)]),
        (16, 11, 88, [(0, 88, 11)]),
        (16, 11, 89, [(0, 88, 11), (88, 1, 1)]),
        (16, 11, 256, [(0, 88, 11), (88, 40, 5), (128, 88, 11), (216, 40, 5)]),
        (16, 11, 9, [(0, 9, 2)]),
        # A page of 16 KiB has four grants: two of them fit, and nothing is linked.
        (4, 11, 32, [(0, 32, 4)]),
        (4, 11, 64, [(0, 64, 8)]),
        (4, 11, 96, [(0, 64, 8), (64, 32, 4)]),
        (4, 11, 1, [(0, 1, 1)]),
        # With descriptors a request has whole pages.
        (16, 32, 256, [(0, 256, 32)]),
        (16, 32, 384, [(0, 256, 32), (256, 128, 16)]),
        (16, 40, 384, [(0, 256, 32), (256, 128, 16)]),
        (4, 34, 512, [(0, 256, 32), (256, 256, 32)]),
        # Any number of parts: a page in requests of three grants.
        (16, 3, 128, [(i * 24, 24, 3) for i in range(5)] + [(120, 8, 1)]),
    ],
)
def test_how_requests_are_cut(
    page_grants: int, segments_max: int, sectors: int, wanted: list[tuple[int, int, int]]
) -> None:
    with FrontWorld(page_grants=page_grants, segments_max=segments_max) as world:
        world.queue.submit(READ, 0, sectors, bytearray(sectors * 512), 1)
        requests = world.requests()
        assert cut(world, requests) == wanted
        world.reply(*requests)
        assert world.queue.reap() == [(1, 0)]


@pytest.mark.parametrize("page_grants", [4, 16])
@pytest.mark.parametrize("sectors", [1, 7, 8, 9, 31, 33, 127, 128, 129, 300])
def test_there_are_exactly_as_many_grants_as_the_data_needs(page_grants: int, sectors: int) -> None:
    with FrontWorld(page_grants=page_grants) as world:
        world.queue.submit(WRITE, 0, sectors, bytes(sectors * 512), 1)
        requests = world.serve()
        assert all(segment.sectors > 0 for r in requests for segment in world.segments(r))
        full = sum(-(-size // 8) for _, size, _ in cut(world, requests))
        assert world.queue.counters()["granted"] == full
        assert sum(size for _, size, _ in cut(world, requests)) == sectors


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("statuses", "outcome"),
    [
        ((0, 0), 0),
        ((0, Status.ERROR), errno.EIO),
        ((Status.ERROR, 0), errno.EIO),
        ((Status.EOPNOTSUPP, 0), errno.EOPNOTSUPP),
        ((Status.EOPNOTSUPP, Status.ERROR), errno.EIO),
        ((Status.ERROR, Status.EOPNOTSUPP), errno.EIO),
    ],
)
def test_the_two_statuses_become_one_in_either_order(
    order: int, statuses: tuple[int, int], outcome: int
) -> None:
    with FrontWorld(page_grants=16) as world:
        world.queue.submit(WRITE, 0, 128, bytes(65536), 1)
        pairs = list(zip(world.requests(), statuses, strict=True))[::order]
        for last, (request, status) in enumerate(pairs):
            assert world.queue.reap() == []
            world.reply(request, status=status)
            assert bool(world.queue.in_flight) == (last == 0)
        assert world.queue.reap() == [(1, outcome)]


def test_both_halves_go_or_neither() -> None:
    """31 flushes leave one slot: half of a page is not put into it."""
    with FrontWorld(page_grants=16) as world:
        for token in range(31):
            world.queue.submit(FLUSH, 0, 0, None, token)
        flushes = world.requests()
        world.queue.submit(WRITE, 0, 128, bytes(65536), 100)
        assert world.requests() == []
        world.reply(flushes[0])
        assert len(world.requests()) == 2
        assert world.queue.in_flight == 32


def test_sixteen_pages_at_a_time_fill_the_ring_and_no_more() -> None:
    """Half as many as the ring has slots, since each takes two."""
    with FrontWorld(page_grants=16) as world:
        for token in range(20):
            world.queue.submit(WRITE, token * 1000, 128, bytes(65536), token)
        first = world.requests()
        assert len(first) == 32
        world.reply(*first)
        assert len(world.queue.reap()) == 16


def test_small_operations_share_one_page_of_the_guest() -> None:
    """Linux's frontend takes 64 KiB for each 4 KiB that it grants; here they lie side by side."""
    with FrontWorld(page_grants=16, persistent=True, keeping=True) as world:
        for token in range(16):
            world.queue.submit(WRITE, token * 100, 8, bytes(4096), token)
        requests = world.serve()
        used = {world.pages.grefs.index(world.segments(r)[0].gref) for r in requests}
        assert {page // 16 for page in used} == {0}
        assert len(used) == 16


@pytest.mark.parametrize(
    ("segments", "page_grants", "needed"),
    [(11, 1, 11), (32, 1, 33), (11, 4, 12), (11, 16, 16), (32, 16, 48), (4096, 1, 4104)],
)
def test_pages_that_a_queue_needs(segments: int, page_grants: int, needed: int) -> None:
    assert FrontQueue.pages_needed(segments, page_grants) == needed


@pytest.mark.parametrize("page_grants", [0, 2, 8, 32])
def test_there_are_no_other_pages(page_grants: int) -> None:
    with pytest.raises(LocalProtocolError, match="a page has 1, 4 or 16 grants"):
        FrontQueue.pages_needed(11, page_grants)
