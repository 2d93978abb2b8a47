# SPDX-License-Identifier: Apache-2.0
"""A queue that leaves its ring to a successor while the storage still has requests."""

import pytest
from rig_engines import ByHand
from rig_queue import ALL, DRAINED, LEFT, QueueWorld, rq

from xvd.blkif.abi import Op, Status
from xvd.dataplane.back.queue import BackendQueue
from xvd.engines.memory import MemoryEngine
from xvd.errors import LocalProtocolError

MODES = pytest.mark.parametrize(
    "mode",
    [{"copying": True}, {}, {"persistent": 64}, {"persistent": 1}, {"indirect_max": 32}],
    ids=["copy", "map", "persistent", "few persistent", "indirect"],
)


def leave(world: QueueWorld) -> BackendQueue:
    """Let the queue leave; its successor has other storage, and what it left."""
    former = world.queue
    former.pause()
    former.leave()
    assert former.step() == LEFT
    assert not former.has_left
    assert former.step() == (0 if former.in_flight else DRAINED)
    assert former.has_left
    assert former.may_sleep() == (former.in_flight > 0)
    world.channel = MemoryEngine(1 << 20).open_channel()
    world.queue = world.make_queue(resume=True)
    return former


@MODES
def test_a_successor_executes_what_hanging_storage_has(mode: dict[str, int]) -> None:
    engine = ByHand(1 << 20)
    with QueueWorld(engine, **mode) as world:
        world.data(0)[:] = b"a" * 4096
        world.send(rq(Op.WRITE, 0, world.segment(0), id=1))
        world.send(rq(Op.READ, 8, world.segment(1), world.segment(2), id=2))
        world.settle()
        hanging = engine.channel.take()
        former = leave(world)
        world.settle()

        answers = sorted((a.id, a.status) for a in world.responses())

        assert answers == [(1, Status.OKAY), (2, Status.OKAY)]
        assert (former.counters()["requests"], world.queue.counters()["requests"]) == (0, 2)
        for operation in hanging:
            operation.complete()
        assert former.step() & DRAINED


@MODES
def test_what_the_storage_ends_late_reaches_no_page_of_the_guest(mode: dict[str, int]) -> None:
    engine = ByHand(1 << 20)
    with QueueWorld(engine, **mode) as world:
        world.send(rq(Op.READ, 0, *(world.segment(i) for i in range(4)), id=1))
        world.settle()
        [late] = engine.channel.take()
        former = leave(world)
        world.settle()
        for i in range(4):
            world.data(i)[:] = b"mine" * 1024

        for buffer in late.buffers():
            buffer[:] = b"L" * len(buffer)
        late.complete()

        assert former.step() & DRAINED
        assert bytes(world.pages.view[: 4 * 4096]) == b"mine" * 4096
        assert [a.id for a in world.responses()] == [1]
        [answer] = world.ask(rq(Op.READ, 0, world.segment(0), id=2))
        assert (answer.id, answer.status) == (2, Status.OKAY)


def test_every_page_is_given_back_before_the_storage_has_ended() -> None:
    engine = ByHand(1 << 20)
    with QueueWorld(engine, persistent=64) as world:
        world.send(rq(Op.READ, 0, world.segment(0)))
        world.settle()
        [late] = engine.channel.take()
        former = world.queue
        former.pause()
        former.leave()

        former.step()

        assert world.host.accounting()["pins"] == len(world.ring_pages.grefs)
        assert former.counters()["persistent_grants"] == 0
        late.complete()
        world.queue = world.make_queue(resume=True)


def test_storage_is_pinned_to_pages_that_it_reads_into() -> None:
    engine = ByHand(1 << 20)
    with QueueWorld(engine, persistent=64) as world:
        found = []
        for operation in (Op.WRITE, Op.READ):
            world.send(rq(operation, 0, world.segment(0)))
            world.settle()
            found.append(world.queue.is_pinned)

        assert found == [False, True]
        for late in engine.channel.take():
            late.complete()
        world.settle()
        assert not world.queue.is_pinned


def test_copied_data_pins_nothing() -> None:
    engine = ByHand(1 << 20)
    with QueueWorld(engine, copying=True) as world:
        world.send(rq(Op.READ, 0, world.segment(0)))
        world.settle()

        assert not world.queue.is_pinned
        for late in engine.channel.take():
            late.complete()
        world.settle()


def test_what_was_put_back_is_the_successors_too() -> None:
    engine = ByHand(1 << 20)
    with QueueWorld(engine, offered=ALL) as world:
        world.queue.set_hold(True)
        world.send(rq(Op.WRITE, 0, world.segment(0), id=1))
        world.settle()
        [away] = engine.channel.take()
        away.complete(5)
        world.settle()
        world.queue.pause()
        former = leave(world)
        world.settle()

        assert [(a.id, a.status) for a in world.responses()] == [(1, Status.OKAY)]
        assert former.step() & DRAINED


def test_only_a_paused_queue_leaves() -> None:
    with QueueWorld() as world, pytest.raises(LocalProtocolError, match="paused"):
        world.queue.leave()


def test_a_queue_that_left_is_not_stopped_nor_resumed() -> None:
    engine = ByHand(1 << 20)
    with QueueWorld(engine) as world:
        world.send(rq(Op.READ, 0, world.segment(0)))
        world.settle()
        [late] = engine.channel.take()
        former = leave(world)
        former.stop()
        former.pause()
        former.resume()
        former.release()

        assert not former.step()
        late.complete()
        assert former.step() & DRAINED
