# SPDX-License-Identifier: Apache-2.0
"""Persistent grants, stepped by hand: what stays mapped, for how long, and what is given back."""

import pytest
from rig_engines import ByHand
from rig_queue import BROKEN, DRAINED, WORKED, QueueWorld, bad_gref, rq

from xvd.blkif.abi import Op, Status
from xvd.blkif.messages import Segment

SECOND = 1_000_000_000
LRU = SECOND // 10


def read(world: QueueWorld, *pages: int, id: int = 1) -> None:
    [answer] = world.ask(rq(Op.READ, 0, *(world.segment(page) for page in pages), id=id))
    assert answer.status == Status.OKAY


def mapped(world: QueueWorld) -> list[int]:
    """The data pages that the backend has mapped: those that cannot be revoked, tried out."""
    kept = []
    for page in range(world.pages.count):
        if world.pages.revoke(page):
            world.pages.grant(page)
        else:
            kept.append(page)
    return kept


def figures(world: QueueWorld) -> tuple[object, ...]:
    counters = world.queue.counters()
    names = ("persistent_hits", "persistent_misses", "persistent_grants", "mapped", "unmapped")
    return tuple(counters[name] for name in names)


def test_a_grant_is_mapped_once_and_stays() -> None:
    with QueueWorld(persistent=1056) as world:
        for _ in range(5):
            read(world, 0, 1)
        assert figures(world) == (8, 2, 2, 2, 0)
        assert mapped(world) == [0, 1]


@pytest.mark.beyond_xen("mapping")
def test_without_the_frontend_everything_is_unmapped() -> None:
    with QueueWorld() as world:
        read(world, 0, 1)
        assert figures(world) == (0, 0, 0, 2, 2)
        assert mapped(world) == []


def test_with_grant_copy_nothing_is_mapped() -> None:
    with QueueWorld(persistent=1056, copying=True) as world:
        read(world, 0, 1)
        assert figures(world) == (0, 0, 0, 0, 0)


def test_what_was_mapped_for_a_write_is_read_into() -> None:
    with QueueWorld(persistent=1056) as world:
        world.data(0)[:] = b"p" * 4096
        world.ask(rq(Op.WRITE, 8, world.segment(0)))
        world.data(0)[:] = bytes(4096)
        world.ask(rq(Op.READ, 8, world.segment(0)))
        assert bytes(world.data(0)) == b"p" * 4096
        assert figures(world)[3] == 1


def test_pages_come_in_the_order_of_the_segments_whether_kept_or_not() -> None:
    with QueueWorld(persistent=3) as world:
        for page in range(6):
            world.data(page)[:] = bytes([page + 1]) * 4096
        read_into = [world.segment(page) for page in (10, 11)]
        world.ask(rq(Op.WRITE, 0, world.segment(4), world.segment(2)))
        world.ask(rq(Op.WRITE, 0, *(world.segment(page) for page in (3, 2, 1, 4, 0, 5))))
        world.ask(rq(Op.READ, 0, *read_into), rq(Op.READ, 16, *(read_into)))
        stored = bytes(world.engine.lower.view[: 6 * 4096])  # type: ignore[attr-defined]
        assert stored == b"".join(bytes([page + 1]) * 4096 for page in (3, 2, 1, 4, 0, 5))


def test_above_the_limit_a_grant_is_mapped_for_its_request_only() -> None:
    with QueueWorld(persistent=2) as world:
        read(world, 0, 1, 2, 3)
        assert mapped(world) == [0, 1]
        assert figures(world) == (0, 4, 2, 4, 2)


def test_a_limit_of_none_keeps_nothing() -> None:
    with QueueWorld(persistent=0) as world:
        read(world, 0, 1)
        assert (mapped(world), figures(world)[2]) == ([], 0)


def test_the_same_grant_twice_in_one_request_is_mapped_once() -> None:
    with QueueWorld(persistent=1056) as world:
        read(world, 0, 1, 0, 0)
        assert figures(world) == (2, 2, 2, 2, 0)


def test_the_same_grant_in_two_requests_is_let_go_by_both() -> None:
    engine = ByHand(1 << 20)
    with QueueWorld(engine, persistent=1) as world:
        world.queue.set_time(0)
        world.send(rq(Op.READ, 0, world.segment(0), id=1), rq(Op.READ, 0, world.segment(0), id=2))
        world.settle()
        first, second = engine.channel.take()
        world.queue.set_persistent(0, 60)
        first.complete()
        world.queue.set_time(LRU)
        world.settle()
        assert mapped(world) == [0]
        second.complete()
        world.queue.set_time(2 * LRU)
        world.settle()
        assert mapped(world) == []


def test_what_was_unused_for_a_minute_is_unmapped() -> None:
    with QueueWorld(persistent=1056) as world:
        world.queue.set_time(0)
        read(world, 0, 1)
        world.queue.set_time(30 * SECOND)
        read(world, 1)
        world.queue.set_time(60 * SECOND - 1)
        world.settle()
        assert mapped(world) == [0, 1]
        world.queue.set_time(60 * SECOND)
        world.settle()
        assert mapped(world) == [1]


def test_without_a_time_limit_it_stays_for_ever() -> None:
    with QueueWorld(persistent=1056) as world:
        world.queue.set_persistent(1056, 0)
        world.queue.set_time(0)
        read(world, 0)
        world.queue.set_time(10**9 * SECOND)
        world.settle()
        assert mapped(world) == [0]


def test_a_limit_that_was_too_small_costs_a_twentieth_of_it_those_unused_longest() -> None:
    with QueueWorld(persistent=20, data_pages=40) as world:
        world.queue.set_time(0)
        for page in range(20):
            read(world, page)
        read(world, 0)
        world.queue.set_time(LRU)
        world.settle()
        assert mapped(world) == list(range(20))
        read(world, 30)
        world.queue.set_time(2 * LRU)
        world.settle()
        assert mapped(world) == [0, *range(2, 20)]


def test_it_is_looked_at_every_tenth_of_a_second_and_not_before() -> None:
    with QueueWorld(persistent=20) as world:
        world.queue.set_time(0)
        for page in range(21):
            read(world, page)
        world.queue.set_time(LRU - 1)
        world.settle()
        assert len(mapped(world)) == 20
        world.queue.set_time(LRU)
        world.settle()
        assert len(mapped(world)) == 19


def test_a_limit_that_becomes_smaller_is_kept_to() -> None:
    with QueueWorld(persistent=20) as world:
        world.queue.set_time(0)
        for page in range(20):
            read(world, page)
        world.queue.set_persistent(10, 60)
        world.queue.set_time(LRU)
        world.settle()
        assert mapped(world) == list(range(10, 20))


def test_a_limit_that_becomes_larger_is_used() -> None:
    with QueueWorld(persistent=1) as world:
        read(world, 0, 1, 2)
        world.queue.set_persistent(3, 60)
        read(world, 0, 1, 2)
        assert mapped(world) == [0, 1, 2]


def test_nothing_is_purged_under_a_request_that_uses_it() -> None:
    engine = ByHand(1 << 20)
    with QueueWorld(engine, persistent=4) as world:
        world.queue.set_time(0)
        world.send(rq(Op.READ, 0, *(world.segment(page) for page in range(4))))
        world.settle()
        world.queue.set_persistent(0, 1)
        world.queue.set_time(100 * SECOND)
        world.settle()
        assert mapped(world) == [0, 1, 2, 3]
        [operation] = engine.channel.take()
        for buffer in operation.buffers():
            buffer[:] = b"u" * len(buffer)
        operation.complete()
        world.queue.set_time(101 * SECOND)
        world.settle()
        assert mapped(world) == []
        assert bytes(world.pages.view[: 4 * 4096]) == b"u" * 4 * 4096


def test_a_drained_queue_has_nothing_mapped() -> None:
    with QueueWorld(persistent=1056, data_pages=600) as world:
        for page in range(600):
            read(world, page)
        world.queue.stop()
        assert world.queue.step() == DRAINED
        assert mapped(world) == []
        assert figures(world)[3] == figures(world)[4] == 600


def test_a_broken_queue_has_nothing_mapped() -> None:
    with QueueWorld(persistent=1056) as world:
        read(world, 0, 1)
        world.ring_pages.view.cast("I")[0] = 1000
        assert world.queue.step() == BROKEN | DRAINED
        assert mapped(world) == []


def test_a_queue_that_dies_has_nothing_mapped() -> None:
    engine = ByHand(1 << 20)
    with QueueWorld(engine, persistent=2) as world:
        world.send(rq(Op.READ, 0, *(world.segment(page) for page in range(4))))
        world.settle()
        assert mapped(world) == [0, 1, 2, 3]
        world.queue.abandon()
        assert mapped(world) == []


def test_a_grant_that_was_never_made_is_not_kept() -> None:
    with QueueWorld(persistent=1056) as world:
        [answer] = world.ask(rq(Op.READ, 0, world.segment(0), Segment(bad_gref())))
        assert answer.status == Status.ERROR
        assert world.queue.counters()["refusals"] == {"bad_grant": 1}
        assert mapped(world) == [0]
        assert figures(world)[2] == 1


def test_a_grant_that_is_read_only_cannot_be_kept() -> None:
    """Persistent grants are read-write for every operation; a frontend that forgets is told."""
    with QueueWorld(persistent=1056) as world:
        world.pages.grant(0, readonly=True)
        [answer] = world.ask(rq(Op.WRITE, 0, world.segment(0)))
        assert answer.status == Status.ERROR
        assert figures(world)[2] == 0


@pytest.mark.parametrize("limit", [0, 5, 1056])
@pytest.mark.parametrize("position", range(12))
def test_any_mapping_may_fail_and_only_its_requests_do(limit: int, position: int) -> None:
    with QueueWorld(persistent=limit) as world:
        world.grants.inject([0] * position + [-3])
        answers = world.ask(
            *(rq(Op.READ, 8, world.segment(2 * i), world.segment(2 * i + 1), id=i)
              for i in range(6))
        )  # fmt: skip
        failed = [answer.id for answer in answers if answer.status != Status.OKAY]
        assert (len(failed), len(answers)) == (1, 6)
        [again] = world.ask(rq(Op.READ, 8, *(world.segment(page) for page in range(11)), id=9))
        assert again.status == Status.OKAY


def test_one_that_fails_takes_all_that_share_it_along_and_no_other() -> None:
    with QueueWorld(persistent=1056) as world:
        world.grants.inject([-3])
        answers = world.ask(
            rq(Op.READ, 0, world.segment(0), id=1), rq(Op.READ, 0, world.segment(0), id=2),
            rq(Op.READ, 0, world.segment(1), id=3),
        )  # fmt: skip
        status = {answer.id: answer.status for answer in answers}
        assert status == {1: Status.ERROR, 2: Status.ERROR, 3: Status.OKAY}
        read(world, 0)


def test_indirect_pages_are_kept_and_read_anew_each_time() -> None:
    with QueueWorld(persistent=1056, indirect_max=32) as world:
        for first in (0, 12):
            segments = [world.segment(page) for page in range(first, first + 12)]
            [answer] = world.ask(world.indirect(Op.READ, 0, segments))
            assert answer.status == Status.OKAY
        assert figures(world) == (1, 25, 25, 25, 0)
        assert not world.descriptors.revoke(0)
        assert world.queue.counters()["copied"] == 0


def test_indirect_pages_above_the_limit_are_copied() -> None:
    with QueueWorld(persistent=0, indirect_max=32) as world:
        [answer] = world.ask(world.indirect(Op.READ, 0, [world.segment(0)] * 12))
        assert answer.status == Status.OKAY
        assert world.descriptors.revoke(0)
        assert world.queue.counters()["copied"] == 1


def test_an_indirect_page_that_cannot_be_mapped_fails_its_request() -> None:
    with QueueWorld(persistent=1056, indirect_max=32) as world:
        world.grants.inject([-3])
        [answer] = world.ask(world.indirect(Op.READ, 0, [world.segment(0)] * 12))
        assert answer.status == Status.ERROR
        assert figures(world)[2] == 0


def test_more_grants_than_one_call_maps() -> None:
    with QueueWorld(persistent=1056, indirect_max=600, data_pages=600) as world:
        segments = [world.segment(page, page % 8, page % 8) for page in range(600)]
        [answer] = world.ask(world.indirect(Op.READ, 0, segments))
        assert answer.status == Status.OKAY
        assert figures(world)[2] == 602
        world.queue.set_persistent(0, 60)
        world.queue.set_time(1 << 62)
        world.settle()
        assert figures(world)[2] == 0


# ---- Where there is no room to map -----------------------------------------------------------


@pytest.mark.parametrize("status", [-13, -7])
@pytest.mark.parametrize("persistent", [None, 0, 1056])
def test_what_there_is_no_room_to_map_is_copied(persistent: int | None, status: int) -> None:
    with QueueWorld(persistent=persistent) as world:
        world.data(0)[:] = b"w" * 4096
        world.grants.inject([status])
        [answer] = world.ask(rq(Op.WRITE, 0, world.segment(0)))
        assert answer.status == Status.OKAY
        world.grants.inject([status])
        [answer] = world.ask(rq(Op.READ, 0, world.segment(1)))
        assert (answer.status, bytes(world.data(1))) == (Status.OKAY, b"w" * 4096)
        assert world.queue.counters()["copied"] == 2
        assert world.queue.counters()["starved"] == 0


def test_descriptors_that_there_is_no_room_to_map_are_copied() -> None:
    with QueueWorld(persistent=1056, indirect_max=32) as world:
        world.grants.inject([-13])
        [answer] = world.ask(world.indirect(Op.READ, 0, [world.segment(0)] * 12))
        assert answer.status == Status.OKAY
        assert world.queue.counters()["copied"] == 1


def test_without_room_to_copy_either_the_queue_takes_nothing_for_a_millisecond() -> None:
    """blkback sleeps for one after a request that could not be mapped."""
    with QueueWorld() as world:
        world.queue.set_time(1000)
        world.grants.inject([-13, -13])
        world.send(rq(Op.WRITE, 0, world.segment(0), id=1))
        world.queue.step()
        world.send(rq(Op.READ, 0, world.segment(0), id=2))
        for now, answered in ((1000, [(1, Status.ERROR)]), (1_000_999, []), (1_001_000, [2])):
            world.queue.set_time(now)
            flags = world.queue.step()
            found = [(a.id, a.status) if a.status else a.id for a in world.responses()]
            assert found == answered
            assert bool(flags & WORKED) == (answered == [2])
        assert world.queue.due_ns == 0
        assert world.queue.counters()["starved"] == 1


def test_a_queue_that_pauses_may_sleep_and_is_due_at_its_end() -> None:
    with QueueWorld() as world:
        world.queue.set_time(1000)
        world.grants.inject([-13, -13])
        world.send(rq(Op.WRITE, 0, world.segment(0), id=1))
        world.queue.step()
        world.send(rq(Op.READ, 0, world.segment(0), id=2))
        assert world.queue.may_sleep()
        assert world.queue.due_ns == 1_001_000


@pytest.mark.parametrize("operation", [Op.READ, Op.WRITE])
def test_the_thread_wakes_by_itself_when_the_pause_is_over(operation: Op) -> None:
    with QueueWorld() as world:
        world.grants.inject([-13, -13])
        with world.running():
            answers = []
            for number in (1, 2):
                world.send(rq(operation, 0, world.segment(0), id=number))
                world.port.notify()
                answers += world.collect(1)
        assert [answer.status for answer in answers] == [Status.ERROR, Status.OKAY]
        assert world.queue.counters()["starved"] == 1


def test_a_bad_grant_does_not_make_the_queue_pause() -> None:
    with QueueWorld() as world:
        world.grants.inject([-3])
        [answer] = world.ask(rq(Op.READ, 0, world.segment(0)))
        assert answer.status == Status.ERROR
        assert world.queue.counters()["starved"] == 0


# ---- Where unmapping takes its time: Linux's gntdev ------------------------------------------


def test_where_unmapping_takes_its_time_nothing_is_mapped_for_one_request() -> None:
    """Linux's frontend disables itself when it finds a page mapped after the response."""
    with QueueWorld(unmaps_at_once=False) as world:
        read(world, 0, 1)
        assert figures(world)[3:] == (0, 0)
        assert world.queue.copying
        assert world.queue.counters()["copied"] == 2


def test_where_unmapping_takes_its_time_what_is_not_kept_is_copied() -> None:
    """The second request finds only one of its pages in the full book; all its data is right."""
    with QueueWorld(persistent=2, unmaps_at_once=False) as world:
        read(world, 0, 1)
        for page in (1, 2, 3):
            world.data(page)[:] = bytes([page]) * 4096
        world.ask(rq(Op.WRITE, 0, *(world.segment(page) for page in (1, 2, 3))))
        world.ask(rq(Op.READ, 0, *(world.segment(page) for page in (4, 1, 5))))
        assert [world.data(page)[0] for page in (4, 1, 5)] == [1, 2, 3]
        assert mapped(world) == [0, 1]
        assert figures(world)[3:] == (2, 0)
        assert world.queue.counters()["copied"] == 6


@pytest.mark.parametrize("position", range(4))
def test_what_cannot_be_mapped_is_copied(position: int) -> None:
    """Linux gives a process 65530 mappings: a disk must not fail when they are used up."""
    with QueueWorld(persistent=1056, unmaps_at_once=False) as world:
        for page in range(4):
            world.data(page)[:] = bytes([page + 1]) * 4096
        world.grants.inject([0] * position + [-3])
        world.ask(rq(Op.WRITE, 0, *(world.segment(page) for page in range(4))))
        world.ask(rq(Op.READ, 0, *(world.segment(page) for page in range(10, 14))))
        assert [world.data(page)[0] for page in range(10, 14)] == [1, 2, 3, 4]
        assert position not in mapped(world)
        assert world.queue.counters()["errors"] == 0


def test_what_was_never_granted_can_be_copied_no_more_than_mapped() -> None:
    with QueueWorld(persistent=1056, unmaps_at_once=False) as world:
        [answer] = world.ask(rq(Op.READ, 0, world.segment(0), Segment(bad_gref())))
        assert answer.status == Status.ERROR
        assert world.queue.counters()["refusals"] == {"bad_grant": 1}
