# SPDX-License-Identifier: Apache-2.0
"""Barriers, against storage that the test completes: what waits for what."""

import pytest
from rig_engines import ByHand
from rig_queue import ALL, QueueWorld, rq

from xvd.blkif.abi import Op, Status
from xvd.engines.bridge import Operation

OFFERED = ALL | 1 << Op.WRITE_BARRIER
MODES = pytest.mark.parametrize("copying", [False, True], ids=["map", "copy"])


def barrier_world(engine: ByHand, *, copying: bool = False) -> QueueWorld:
    return QueueWorld(engine, offered=OFFERED, copying=copying)


def submitted(world: QueueWorld, engine: ByHand) -> list[Operation]:
    world.settle()
    return engine.channel.take()


def end(world: QueueWorld, operations: list[Operation], error: int = 0) -> None:
    for operation in operations:
        operation.complete(error)
    world.settle()


@MODES
def test_a_barrier_with_data_flushes_writes_and_flushes_again(copying: bool) -> None:
    engine = ByHand(1 << 20)
    with barrier_world(engine, copying=copying) as world:
        world.data(0)[:512] = b"b" * 512
        world.send(rq(Op.WRITE_BARRIER, 9, world.segment(0, 0, 0), id=4))
        done = []
        while operations := submitted(world, engine):
            [operation] = operations
            data = bytes(operation.buffers()[0]) if operation.kind == "write" else b""
            done.append((operation.kind, operation.offset if data else 0, data))
            assert world.responses() == []
            end(world, operations)
        assert done == [("flush", 0, b""), ("write", 9 * 512, b"b" * 512), ("flush", 0, b"")]
        [answer] = world.responses()
        assert (answer.id, answer.operation, answer.status) == (4, Op.WRITE_BARRIER, Status.OKAY)


def test_a_barrier_without_data_is_one_flush() -> None:
    engine = ByHand(1 << 20)
    with barrier_world(engine) as world:
        world.send(rq(Op.WRITE_BARRIER, 123456789))
        operations = submitted(world, engine)
        kinds = [operation.kind for operation in operations]
        end(world, operations)
        assert (kinds, submitted(world, engine)) == (["flush"], [])
        assert [answer.status for answer in world.responses()] == [Status.OKAY]


def test_a_barrier_waits_for_everything_before_it() -> None:
    engine = ByHand(1 << 20)
    with barrier_world(engine) as world:
        world.send(
            rq(Op.WRITE, 0, world.segment(0), id=1), rq(Op.READ, 8, world.segment(1), id=2),
            rq(Op.WRITE_BARRIER, 16, world.segment(2), id=3),
        )  # fmt: skip
        first, second = submitted(world, engine)
        end(world, [first])
        assert submitted(world, engine) == []
        assert world.queue.may_sleep()
        end(world, [second])
        operations = submitted(world, engine)
        kinds = [operation.kind for operation in operations]
        while operations:
            end(world, operations)
            operations = submitted(world, engine)
        assert kinds == ["flush"]
        assert [answer.id for answer in world.responses()] == [1, 2, 3]


def test_everything_after_a_barrier_waits_for_it() -> None:
    engine = ByHand(1 << 20)
    with barrier_world(engine) as world:
        world.send(
            rq(Op.WRITE_BARRIER, 0, world.segment(0), id=1), rq(Op.READ, 0, world.segment(1), id=2),
            rq(Op.WRITE_BARRIER, id=3), rq(Op.READ, 0, world.segment(1), id=4),
        )  # fmt: skip
        kinds = []
        while operations := submitted(world, engine):
            kinds.append([operation.kind for operation in operations])
            end(world, operations)
        assert kinds == [["flush"], ["write"], ["flush"], ["read"], ["flush"], ["read"]]
        assert [answer.id for answer in world.responses()] == [1, 2, 3, 4]


@pytest.mark.parametrize("stage", range(3))
def test_a_barrier_that_fails_at_any_stage_fails_once_and_lets_go(stage: int) -> None:
    engine = ByHand(1 << 20)
    with barrier_world(engine) as world:
        world.send(rq(Op.WRITE_BARRIER, 0, world.segment(0), id=1))
        for _ in range(stage):
            end(world, submitted(world, engine))
        end(world, submitted(world, engine), error=5)
        assert [(a.id, a.status) for a in world.responses()] == [(1, Status.ERROR)]
        world.send(rq(Op.READ, 0, world.segment(0), id=2))
        end(world, submitted(world, engine))
        assert [answer.id for answer in world.responses()] == [2]
        assert world.pages.revoke(0)


def test_a_barrier_that_is_refused_holds_nobody_up() -> None:
    engine = ByHand(1 << 20)
    with barrier_world(engine) as world:
        world.send(
            rq(Op.WRITE_BARRIER, 0, world.segment(0), id=1),
            rq(Op.WRITE_BARRIER, 1 << 40, world.segment(0), id=2),
            rq(Op.READ, 0, world.segment(1), id=3),
        )  # fmt: skip
        while operations := submitted(world, engine):
            end(world, operations)
        answers = {answer.id: answer.status for answer in world.responses()}
        assert answers == {1: Status.OKAY, 2: Status.ERROR, 3: Status.OKAY}


def test_a_successor_does_a_barrier_again_and_nothing_before_it_ends() -> None:
    engine = ByHand(1 << 20)
    with barrier_world(engine) as world:
        world.send(
            rq(Op.WRITE_BARRIER, 0, world.segment(0), id=1), rq(Op.READ, 0, world.segment(1), id=2)
        )
        submitted(world, engine)
        world.succeed()
        kinds = []
        while operations := submitted(world, engine):
            kinds += [operation.kind for operation in operations]
            end(world, operations)
        assert kinds == ["flush", "write", "flush", "read"]
        assert [answer.id for answer in world.responses()] == [1, 2]
