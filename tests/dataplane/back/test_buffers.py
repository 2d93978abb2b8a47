# SPDX-License-Identifier: Apache-2.0
"""What a copying queue keeps in memory between requests, and gives back when memory is short."""

from pathlib import Path

import pytest
from rig_engines import ByHand
from rig_queue import QueueWorld, rq

from xvd.blkif.abi import Op, Status

MS = 1_000_000


def resident_kb() -> int:
    """Anonymous memory of this process, as the kernel counts it."""
    text = Path("/proc/self/smaps_rollup").read_text()
    [line] = [line for line in text.splitlines() if line.startswith("Anonymous:")]
    return int(line.split()[1])


def kept(world: QueueWorld) -> tuple[object, object]:
    counters = world.queue.counters()
    return counters["buffer_pages"], counters["buffer_pages_released"]


def write(world: QueueWorld, *sizes: int) -> None:
    """Writes of so many whole pages, all at once."""
    requests = [rq(Op.WRITE, 0, *[world.segment(0)] * size, id=i) for i, size in enumerate(sizes)]
    assert {answer.status for answer in world.ask(*requests)} == {Status.OKAY}


def test_pages_that_data_was_copied_through_are_kept() -> None:
    with QueueWorld(copying=True) as world:
        write(world, 11, 11)
        assert kept(world) == (22, 0)
        write(world, 11, 11)
        assert kept(world) == (22, 0)


@pytest.mark.beyond_xen("mapping")
def test_a_mapping_queue_keeps_none() -> None:
    with QueueWorld() as world:
        write(world, 11, 11)
        assert kept(world) == (0, 0)


def test_above_the_limit_they_go_back_at_once() -> None:
    with QueueWorld(copying=True, max_pages=20) as world:
        write(world, 11, 11, 11)
        assert kept(world) == (11, 22)


def test_the_limit_may_change_while_it_runs() -> None:
    with QueueWorld(copying=True) as world:
        write(world, 11, 11)
        world.queue.set_max_pages(0)
        world.settle()
        assert kept(world) == (0, 22)


def test_under_pressure_none_are_kept_until_the_window_ends() -> None:
    with QueueWorld(copying=True) as world:
        world.queue.set_time(0)
        write(world, 11, 11)
        world.queue.squeeze(0.010)
        world.settle()
        assert kept(world) == (0, 22)
        world.queue.set_time(10 * MS - 1)
        write(world, 5)
        assert kept(world) == (0, 27)
        world.queue.set_time(10 * MS)
        write(world, 5)
        assert kept(world) == (5, 27)


def test_what_a_request_uses_stays_under_pressure() -> None:
    engine = ByHand(1 << 20)
    with QueueWorld(engine, copying=True) as world:
        world.queue.set_time(0)
        world.data(0)[:] = b"s" * 4096
        world.send(rq(Op.WRITE, 0, world.segment(0)))
        world.settle()
        world.queue.squeeze(1.0)
        world.settle()
        [operation] = engine.channel.take()
        assert bytes(operation.buffers()[0]) == b"s" * 4096
        operation.complete()
        world.settle()
        assert kept(world) == (0, 1)


def test_memory_really_goes_back_to_the_system() -> None:
    with QueueWorld(copying=True, indirect_max=4096, data_pages=1) as world:
        world.queue.set_time(0)
        [answer] = world.ask(world.indirect(Op.READ, 0, [world.segment(0)] * 256))
        assert answer.status == Status.OKAY
        before = resident_kb()
        world.queue.squeeze(1.0)
        world.settle()
        assert kept(world) == (0, 256)
        assert before - resident_kb() >= 256 * 4 * 0.9


def test_data_is_right_after_its_pages_were_given_back() -> None:
    with QueueWorld(copying=True, max_pages=0) as world:
        for turn in range(3):
            world.data(0)[:] = bytes([turn + 1]) * 4096
            world.ask(rq(Op.WRITE, 0, world.segment(0)), rq(Op.READ, 8, world.segment(2)))
            world.ask(rq(Op.READ, 0, world.segment(1)))
            assert bytes(world.data(1)) == bytes([turn + 1]) * 4096
            assert bytes(world.data(2)) == bytes(4096)
