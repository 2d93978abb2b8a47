# SPDX-License-Identifier: Apache-2.0
"""Indirect requests that lie: in their slot, in their pages, and while we read."""

import threading

import pytest
from rig_queue import QueueWorld, bad_gref, rq

from xvd.blkif.abi import Abi, Op, Status
from xvd.blkif.messages import IndirectRequest, Segment
from xvd.types import Gref, RequestId

MODES = pytest.mark.parametrize("copying", [False, True], ids=["map", "copy"])
ABIS = pytest.mark.parametrize("abi", list(Abi), ids=lambda abi: abi.name)


def twelve(world: QueueWorld) -> list[Segment]:
    return [world.segment(page) for page in range(12)]


def claiming(world: QueueWorld, count: int, operation: int = Op.READ) -> IndirectRequest:
    """A request that states `count` segments, with eight good indirect pages."""
    return IndirectRequest(operation, RequestId(1), 0, count, tuple(world.descriptors.grefs))


@MODES
@ABIS
@pytest.mark.parametrize("operation", [2, 3, 4, 5, 6, 7, 255])
def test_an_inner_operation_other_than_read_and_write(
    abi: Abi, copying: bool, operation: int
) -> None:
    with QueueWorld(abi=abi, copying=copying, indirect_max=32) as world:
        [answer] = world.ask(world.indirect(operation, 0, twelve(world)))
        assert (answer.operation, answer.status) == (operation, Status.ERROR)
        assert world.queue.counters()["refusals"] == {"indirect_operation": 1}
        world.still_serves()


@MODES
def test_no_segments(copying: bool) -> None:
    with QueueWorld(copying=copying, indirect_max=32) as world:
        world.refused(claiming(world, 0), "no_segments", Status.ERROR)


@MODES
@pytest.mark.parametrize("count", [33, 512, 513, 4096, 4097, 65535])
def test_more_segments_than_were_offered(copying: bool, count: int) -> None:
    with QueueWorld(copying=copying, indirect_max=32) as world:
        world.refused(claiming(world, count), "too_many_segments", Status.ERROR)


@MODES
@pytest.mark.parametrize("count", [4097, 65535])
def test_more_segments_than_eight_pages_hold(copying: bool, count: int) -> None:
    with QueueWorld(copying=copying, indirect_max=4096) as world:
        world.refused(claiming(world, count), "too_many_segments", Status.ERROR)


@pytest.mark.beyond_xen("mapping")
def test_a_write_on_a_read_only_disk_is_refused_before_its_pages_are_looked_at() -> None:
    with QueueWorld(read_only=True, indirect_max=32) as world:
        request = IndirectRequest(Op.WRITE, RequestId(1), 0, 12, (bad_gref(),))
        world.refused(request, "read_only", Status.ERROR)
        assert world.queue.counters()["copied"] == 0


@MODES
@pytest.mark.parametrize(
    ("segment", "sector", "reason"),
    [
        ((3, 2), 0, "segment_order"),
        ((0, 8), 0, "segment_past_page"),
        ((255, 255), 0, "segment_past_page"),
        ((0, 7), 2048, "out_of_range"),
        ((0, 7), 2**64 - 1, "out_of_range"),
        ((0, 7), 2048 - 12 * 8 + 1, "out_of_range"),
    ],
)
def test_segments_are_judged_as_those_of_a_slot(
    copying: bool, segment: tuple[int, int], sector: int, reason: str
) -> None:
    with QueueWorld(copying=copying, indirect_max=32) as world:
        segments = [*twelve(world)[:11], Segment(world.pages.grefs[11], *segment)]
        world.refused(world.indirect(Op.READ, sector, segments), reason, Status.ERROR)


@MODES
@pytest.mark.parametrize("gref", [0, bad_gref(), 2048, 2**32 - 1])
def test_an_indirect_page_that_was_never_granted(copying: bool, gref: int) -> None:
    with QueueWorld(copying=copying, indirect_max=32) as world:
        request = IndirectRequest(Op.READ, RequestId(1), 0, 12, (Gref(gref),))
        world.refused(request, "bad_grant", Status.ERROR)


@MODES
def test_the_second_of_two_indirect_pages_was_never_granted(copying: bool) -> None:
    with QueueWorld("memory:4M", copying=copying, indirect_max=4096) as world:
        pages = (world.descriptors.grefs[0], bad_gref())
        request = IndirectRequest(Op.READ, RequestId(1), 0, 513, pages)
        world.refused(request, "bad_grant", Status.ERROR)


@MODES
@pytest.mark.parametrize("position", [0, 15, 31])
def test_one_bad_gref_among_many_leaves_no_mapping(copying: bool, position: int) -> None:
    with QueueWorld(copying=copying, indirect_max=32) as world:
        segments = [world.segment(page) for page in range(32)]
        segments[position] = Segment(bad_gref())
        world.refused(world.indirect(Op.WRITE, 0, segments), "bad_grant", Status.ERROR)
        assert all(world.pages.revoke(page) for page in range(32))


def test_indirect_pages_that_are_not_used_are_not_touched() -> None:
    with QueueWorld(indirect_max=32) as world:
        good = world.indirect(Op.READ, 0, twelve(world))
        request = IndirectRequest(
            Op.READ, RequestId(1), 0, 12, (*good.indirect_grefs, *[bad_gref()] * 7)
        )
        [answer] = world.ask(request)
        assert answer.status == Status.OKAY


@MODES
def test_pages_rewritten_after_they_were_copied_change_nothing(copying: bool) -> None:
    """XSA-155: descriptors that are read twice can be shown twice."""
    with QueueWorld(copying=copying, indirect_max=32) as world:
        world.data(0)[:] = b"a" * 4096
        world.send(world.indirect(Op.WRITE, 0, [world.segment(0)] * 12))
        flags = world.queue.step()
        world.indirect(Op.WRITE, 2047, [Segment(bad_gref(), 7, 0)] * 12)
        world.settle()
        assert flags & 1
        assert [answer.status for answer in world.responses()] == [Status.OKAY]


@MODES
def test_pages_that_change_all_the_time_yield_one_answer_each(copying: bool) -> None:
    """Whatever is seen is judged: an answer for each request, and nothing left mapped."""
    with QueueWorld(copying=copying, indirect_max=32) as world:
        stop = threading.Event()
        good = [Segment(world.pages.grefs[0], 0, 0)] * 12
        bad = [Segment(bad_gref(), 7, 255)] * 12

        def rewrite() -> None:
            while not stop.is_set():
                world.indirect(Op.READ, 0, good)
                world.indirect(Op.READ, 0, bad)

        thread = threading.Thread(target=rewrite)
        request = world.indirect(Op.READ, 0, good)
        thread.start()
        try:
            answers = [answer for _ in range(50) for answer in world.ask(request)]
        finally:
            stop.set()
            thread.join()
        assert len(answers) == 50
        world.still_serves()


def test_an_indirect_request_between_others_spoils_none_of_them() -> None:
    with QueueWorld(indirect_max=32) as world:
        answers = world.ask(
            rq(Op.READ, 0, world.segment(0), id=1),
            world.indirect(Op.READ, 0, [Segment(bad_gref())] * 12, id=2),
            rq(Op.READ, 0, world.segment(1), id=3),
        )
        assert {a.id: a.status for a in answers} == {1: 0, 2: Status.ERROR, 3: 0}
