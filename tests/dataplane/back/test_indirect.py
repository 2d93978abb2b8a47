# SPDX-License-Identifier: Apache-2.0
"""Indirect requests, stepped by hand: their segments lie in granted pages of their own."""

from dataclasses import replace

import pytest
from rig_engines import ByHand
from rig_queue import QueueWorld, rq

from xvd.blkif.abi import Abi, Op, Status
from xvd.blkif.messages import Segment
from xvd.engines.uri import open_engine

MODES = pytest.mark.parametrize("copying", [False, True], ids=["map", "copy"])
ABIS = pytest.mark.parametrize("abi", list(Abi), ids=lambda abi: abi.name)


def whole(world: QueueWorld, first: int, count: int) -> list[Segment]:
    return [world.segment(page) for page in range(first, first + count)]


@MODES
@ABIS
def test_what_is_written_is_read_again(abi: Abi, copying: bool) -> None:
    with QueueWorld(abi=abi, copying=copying, indirect_max=32, data_pages=64) as world:
        for page in range(32):
            world.data(page)[:] = bytes([page]) * 4096
        write = world.indirect(Op.WRITE, 8, whole(world, 0, 32), id=1)
        read = world.indirect(Op.READ, 8, whole(world, 32, 32), id=2, first=1)
        answers = world.ask(write, read)
        assert [(a.id, a.operation, a.status) for a in answers] == [(1, 1, 0), (2, 0, 0)]
        assert bytes(world.pages.view[32 * 4096 :]) == bytes(world.pages.view[: 32 * 4096])


@MODES
def test_the_answer_names_the_inner_operation(copying: bool) -> None:
    """Linux's blkfront compares it with the operation that it remembers."""
    with QueueWorld(copying=copying, indirect_max=32) as world:
        [answer] = world.ask(world.indirect(Op.WRITE, 0, whole(world, 0, 12), id=3))
        assert (answer.id, answer.operation, answer.status) == (3, Op.WRITE, Status.OKAY)


@MODES
@pytest.mark.parametrize("count", [1, 11, 12, 511, 512, 513, 4095, 4096])
def test_any_number_of_segments_up_to_the_limit(copying: bool, count: int) -> None:
    with QueueWorld("memory:4M", copying=copying, indirect_max=4096) as world:
        segments = [world.segment(page % 32, page % 8, page % 8) for page in range(count)]
        for page in range(32):
            world.data(page)[:] = bytes([page + 1]) * 4096
        [answer] = world.ask(world.indirect(Op.WRITE, 0, segments))
        assert answer.status == Status.OKAY
        stored = bytes(world.engine.lower.view[: count * 512])  # type: ignore[attr-defined]
        assert stored == b"".join(bytes([page % 32 + 1]) * 512 for page in range(count))


@MODES
def test_more_parts_than_the_system_takes_at_once(copying: bool, tmp_path: object) -> None:
    path = f"{tmp_path}/disk.img"
    with open(path, "wb") as file:
        file.truncate(4 << 20)
    with QueueWorld(path, copying=copying, indirect_max=4096) as world, world.running():
        for page in range(32):
            world.data(page)[:] = bytes([page + 1]) * 4096
        segments = [
            world.segment(page % 32, 7 * (page % 2), 7 * (page % 2)) for page in range(3000)
        ]
        world.send(world.indirect(Op.WRITE, 1, segments))
        world.port.notify()
        [answer] = world.collect(1)
        assert answer.status == Status.OKAY
    with open(path, "rb") as file:
        stored = file.read()[512 : 512 + 3000 * 512]
    assert stored == b"".join(bytes([page % 32 + 1]) * 512 for page in range(3000))


@MODES
def test_every_page_is_given_back_before_the_answer(copying: bool) -> None:
    with QueueWorld(copying=copying, indirect_max=32) as world:
        world.ask(world.indirect(Op.READ, 0, whole(world, 0, 32)))
        assert all(world.pages.revoke(page) for page in range(32))
        assert world.descriptors.revoke(0)


def test_a_segment_may_name_the_page_it_lies_in() -> None:
    with QueueWorld(indirect_max=32) as world:
        segments = [Segment(world.descriptors.grefs[0])] * 12
        [answer] = world.ask(world.indirect(Op.READ, 0, segments))
        assert answer.status == Status.OKAY


def test_where_spaces_are_few_the_ring_waits_for_one() -> None:
    """4096 segments leave four spaces: the fifth request stays on the ring, and all behind it."""
    engine = ByHand(4 << 20)
    with QueueWorld(engine, indirect_max=4096) as world:
        requests = [world.indirect(Op.READ, 0, whole(world, 0, 12), id=i) for i in range(5)]
        world.send(*requests, rq(Op.READ, 0, world.segment(0), id=5))
        world.settle()
        operations = engine.channel.take()
        assert (len(operations), world.queue.in_flight) == (4, 4)
        assert world.queue.may_sleep()
        assert world.queue.counters()["oo_req"] == 1
        for operation in operations:
            operation.complete()
        world.settle()
        for operation in engine.channel.take():
            operation.complete()
        world.settle()
        assert [answer.id for answer in world.responses()] == list(range(6))
        assert world.queue.counters()["oo_req"] == 1


@MODES
def test_a_successor_reads_the_descriptors_again(copying: bool) -> None:
    """The pages may hold something else by then; what they hold then is judged and done."""
    engine = ByHand(1 << 20)
    with QueueWorld(engine, copying=copying, indirect_max=32) as world:
        world.send(world.indirect(Op.WRITE, 0, whole(world, 0, 12), id=7))
        world.settle()
        world.indirect(Op.WRITE, 0, [Segment(world.pages.grefs[0], 0, 0)] * 12)
        world.succeed()
        world.settle()
        [operation] = engine.channel.take()
        length = operation.length
        operation.complete()
        world.settle()
        assert length == 12 * 512
        assert [(a.id, a.operation, a.status) for a in world.responses()] == [(7, 1, 0)]


@MODES
def test_a_successor_refuses_descriptors_that_have_become_bad(copying: bool) -> None:
    engine = ByHand(1 << 20)
    with QueueWorld(engine, copying=copying, indirect_max=32) as world:
        world.send(world.indirect(Op.READ, 0, whole(world, 0, 12), id=7))
        world.settle()
        world.indirect(Op.READ, 0, [Segment(world.pages.grefs[0], 3, 2)] * 12)
        world.succeed()
        world.settle()
        assert [(a.id, a.status) for a in world.responses()] == [(7, Status.ERROR)]
        assert world.queue.counters()["refusals"] == {"segment_order": 1}


def test_a_successor_begins_what_it_has_room_for_and_the_rest_later() -> None:
    engine = ByHand(4 << 20)
    with QueueWorld(engine, indirect_max=1024, data_pages=64) as world:
        world.send(*(world.indirect(Op.READ, 0, whole(world, 0, 12), id=i) for i in range(16)))
        world.settle()
        world.options = replace(world.options, indirect_max=4096)
        world.succeed()
        answered = 0
        while answered < 16:
            world.settle()
            operations = engine.channel.take()
            assert len(operations) == 4
            for operation in operations:
                operation.complete()
            world.settle()
            answered += len(world.responses())
        assert world.queue.counters()["recovered"] == 16


def test_the_counters_know_indirect_requests_by_what_they_do() -> None:
    with QueueWorld(open_engine("memory:1M"), indirect_max=32) as world:
        world.ask(world.indirect(Op.WRITE, 0, whole(world, 0, 12)))
        counters = world.queue.counters()
        assert (counters["wr_req"], counters["wr_sect"], counters["rd_req"]) == (1, 96, 0)
