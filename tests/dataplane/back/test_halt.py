# SPDX-License-Identifier: Apache-2.0
"""A queue that is paused, held because its storage is away, and given other storage."""

import contextlib
import errno
import os
from collections.abc import Iterator

import pytest
from rig_engines import ByHand
from rig_queue import ALL, DRAINED, EXCHANGED, QueueWorld, rq

from xvd.blkif.abi import Op, Status
from xvd.engines.bridge import BridgeChannel, Operation
from xvd.engines.memory import MemoryEngine
from xvd.errors import LocalProtocolError

MODES = pytest.mark.parametrize(
    "mode",
    [{"copying": True}, {}, {"persistent": 64}, {"indirect_max": 32}],
    ids=["copy", "map", "persistent", "indirect"],
)
AWAY = [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESHUTDOWN, errno.ETIMEDOUT, errno.ENOTCONN]
AWAY += [errno.ENODEV, errno.ENXIO, errno.ECONNABORTED, errno.ENOLINK]


@pytest.fixture
def rest_fd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def told(fd: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(fd)
        return True
    return False


def submitted(world: QueueWorld, channel: BridgeChannel) -> list[Operation]:
    world.settle()
    return channel.take()


def test_a_paused_queue_finishes_what_it_has_and_takes_no_more(rest_fd: int) -> None:
    engine = ByHand(1 << 20)
    with QueueWorld(engine) as world:
        world.send(rq(Op.READ, 0, world.segment(0), id=1))
        [first] = submitted(world, engine.channel)
        world.queue.pause(rest_fd)
        world.send(rq(Op.READ, 8, world.segment(1), id=2))
        assert (submitted(world, engine.channel), world.queue.quiet, told(rest_fd)) == (
            [], False, False,
        )  # fmt: skip
        first.complete()
        assert (submitted(world, engine.channel), world.queue.quiet, told(rest_fd)) == (
            [], True, True,
        )  # fmt: skip
        assert [answer.id for answer in world.responses()] == [1]
        world.queue.resume()
        [second] = submitted(world, engine.channel)
        second.complete()
        world.settle()
        assert [answer.id for answer in world.responses()] == [2]
        assert not told(rest_fd)


def test_a_paused_queue_may_sleep_whatever_lies_on_the_ring() -> None:
    with QueueWorld() as world:
        world.queue.pause()
        world.send(rq(Op.READ, 0, world.segment(0)))
        world.settle()

        assert world.queue.may_sleep()


def test_a_paused_queue_can_be_stopped() -> None:
    with QueueWorld() as world:
        world.queue.pause()
        world.queue.stop()
        world.queue.resume()  # too late

        assert world.queue.step() & DRAINED


@MODES
def test_other_storage_has_what_comes_after_the_exchange(
    mode: dict[str, int], rest_fd: int
) -> None:
    with QueueWorld(**mode) as world, contextlib.closing(MemoryEngine(1 << 20)) as other:
        world.data(0)[:] = b"a" * 4096
        world.ask(rq(Op.WRITE, 0, world.segment(0)))
        world.queue.pause(rest_fd)
        world.settle()
        assert told(rest_fd)
        channel = other.open_channel()
        world.queue.exchange(channel)
        assert not world.queue.exchanged
        assert world.queue.step() == EXCHANGED
        assert world.queue.exchanged
        world.settle()
        assert told(rest_fd)
        world.queue.resume()
        world.data(0)[:] = b"b" * 4096
        assert [a.status for a in world.ask(rq(Op.WRITE, 0, world.segment(0)))] == [Status.OKAY]
        for engine, found in ((world.engine, b"a"), (other, b"b")):
            buffer = bytearray(4096)
            engine.read(memoryview(buffer), 0)
            assert buffer == found * 4096
        world.queue.stop()
        world.settle()
        world.queue.release()
        channel.close()


def test_storage_is_not_exchanged_while_something_is_in_flight() -> None:
    engine = ByHand(1 << 20)
    with QueueWorld(engine) as world:
        world.send(rq(Op.READ, 0, world.segment(0)))
        [operation] = submitted(world, engine.channel)
        world.queue.pause()
        with pytest.raises(LocalProtocolError, match="nothing is in flight"):
            world.queue.exchange(engine.channel)
        operation.complete()
        world.settle()


def test_storage_is_not_exchanged_under_a_running_queue() -> None:
    with QueueWorld() as world, pytest.raises(LocalProtocolError, match="nothing is in flight"):
        world.queue.exchange(world.channel)


@MODES
def test_what_fails_while_the_storage_is_away_is_begun_again(mode: dict[str, int]) -> None:
    engine = ByHand(1 << 20)
    with QueueWorld(engine, offered=ALL, **mode) as world:
        world.queue.set_hold(True)
        world.data(1)[:] = b"w" * 4096
        world.send(
            rq(Op.READ, 0, world.segment(0), id=1),
            world.indirect(Op.WRITE, 8, [world.segment(1)], id=2)
            if "indirect_max" in mode
            else rq(Op.WRITE, 8, world.segment(1), id=2),
            rq(Op.FLUSH_DISKCACHE, id=3),
        )
        for operation in submitted(world, engine.channel):
            operation.complete(errno.EIO)
        world.settle()
        assert (world.queue.held, world.queue.quiet, world.responses()) == (True, True, [])
        world.send(rq(Op.READ, 16, world.segment(2), id=4))
        assert submitted(world, engine.channel) == []
        world.queue.resume()
        again = submitted(world, engine.channel)
        assert sorted(one.kind for one in again) == ["flush", "read", "read", "write"]
        [write] = [one for one in again if one.kind == "write"]
        assert bytes(write.buffers()[0]) == b"w" * 4096
        for operation in again:
            operation.complete()
        world.settle()
        assert sorted((a.id, a.status) for a in world.responses()) == [
            (number, Status.OKAY) for number in (1, 2, 3, 4)
        ]
        counters = world.queue.counters()
        assert (counters["requests"], counters["responses"], counters["held"]) == (4, 4, 3)
        assert (counters["rd_req"], counters["wr_req"], counters["f_req"]) == (2, 1, 1)
        assert (counters["errors"], counters["storage_errors"]) == (0, 0)


ANSWERED = [errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM]


@pytest.mark.parametrize("number", AWAY + ANSWERED, ids=errno.errorcode.get)
def test_errors_that_say_that_the_storage_is_away_hold_and_others_are_answered(number: int) -> None:
    engine = ByHand(1 << 20)
    with QueueWorld(engine) as world:
        world.queue.set_hold(True)
        world.send(rq(Op.READ, 0, world.segment(0)))
        [operation] = submitted(world, engine.channel)
        operation.complete(number)
        world.settle()

        held = number in AWAY
        assert (world.queue.held, len(world.responses())) == (held, not held)


def test_what_was_put_back_is_in_the_journal_for_a_successor() -> None:
    engine = ByHand(1 << 20)
    with QueueWorld(engine) as world:
        world.queue.set_hold(True)
        world.send(rq(Op.READ, 0, world.segment(0), id=9))
        [operation] = submitted(world, engine.channel)
        operation.complete(errno.EIO)
        world.settle()
        world.succeed()
        [again] = submitted(world, engine.channel)
        again.complete()
        world.settle()

        assert [(a.id, a.status) for a in world.responses()] == [(9, Status.OKAY)]


def test_a_barrier_that_was_put_back_goes_on_alone() -> None:
    engine = ByHand(1 << 20)
    with QueueWorld(engine, offered=ALL | 1 << Op.WRITE_BARRIER) as world:
        world.queue.set_hold(True)
        world.send(rq(Op.WRITE_BARRIER, 0, world.segment(0), id=1))
        world.send(rq(Op.READ, 0, world.segment(1), id=2))
        [flush] = submitted(world, engine.channel)
        flush.complete(errno.EIO)
        world.settle()
        world.queue.resume()
        done = []
        while operations := submitted(world, engine.channel):
            [operation] = operations
            done.append(operation.kind)
            operation.complete()

        assert done == ["flush", "write", "flush", "read"]
        assert [answer.id for answer in world.responses()] == [1, 2]
