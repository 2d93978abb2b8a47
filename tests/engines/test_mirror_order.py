# SPDX-License-Identifier: Apache-2.0
"""A mirror whose two storages end their operations in any order, also within a copy.

XVD_SEEDS says how many worlds there are; a failure names its seed.
"""

import errno
import os
import random
from collections.abc import Callable

import pytest
from rig_queue import QueueWorld, discard, rq

from xvd.blkif.abi import Op
from xvd.engines.bridge import BridgeChannel, Operation
from xvd.engines.info import Channel
from xvd.engines.interface import Engine, EngineInfo
from xvd.engines.live.mirror import Mirror
from xvd.engines.memory import MemoryEngine
from xvd.errors import EngineError

SIZE = 6 * (64 << 10)
SECTORS = SIZE // 512
SEEDS = int(os.environ.get("XVD_SEEDS", "12"))
DEPTH, PAGES_EACH = 8, 4


def nothing() -> None:
    """Nobody does anything meanwhile."""


class ByHand(Engine):
    """Storage in memory whose operations end when they are told to, and fail now and then."""

    def __init__(self, draw: random.Random, content: bytes, fails_one_in: int = 0) -> None:
        self.memory = MemoryEngine(SIZE)
        self.memory.view[:] = content
        self.meanwhile: Callable[[], None] = nothing
        self._draw = draw
        self._fails_one_in = fails_one_in
        self._channels: list[BridgeChannel] = []
        self._held: list[Operation] = []

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(size=SIZE, can_discard=True)

    def read(self, buffer: memoryview, offset: int) -> None:
        """What a copy reads; much may happen before it writes that."""
        self.memory.read(buffer, offset)
        self.meanwhile()

    def write(self, buffer: memoryview, offset: int) -> None:
        self.meanwhile()
        self.memory.write(buffer, offset)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self.memory.discard(offset, length)

    def open_channel(self) -> Channel:
        self._channels.append(BridgeChannel())
        return self._channels[-1]

    def end_one(self) -> bool:
        """End one of the operations that are under way, if there is one."""
        for channel in self._channels:
            self._held += channel.take()
        if not self._held:
            return False
        operation = self._held.pop(self._draw.randrange(len(self._held)))
        fails = self._fails_one_in and self._draw.randrange(self._fails_one_in) == 0
        if not fails or self._draw.random() < 0.5:
            self._perform(operation)
        operation.complete(errno.EIO if fails else 0)
        return True

    def _perform(self, operation: Operation) -> None:
        at = operation.offset
        if operation.kind == "discard":
            self.memory.discard(at, operation.length)
        elif operation.kind in ("read", "write"):
            for buffer in operation.buffers():
                getattr(self.memory, operation.kind)(buffer, at)
                at += len(buffer)


class User:
    """A guest's queue: requests of every kind, any of them over any other."""

    def __init__(self, world: QueueWorld, draw: random.Random) -> None:
        self._world = world
        self._draw = draw
        self._free = list(range(DEPTH))

    @property
    def waits(self) -> bool:
        return len(self._free) < DEPTH

    def send(self) -> None:
        if not self._free:
            return
        world, draw = self._world, self._draw
        number = self._free.pop(draw.randrange(len(self._free)))
        sectors = draw.randrange(1, 8 * PAGES_EACH + 1)
        first = draw.randrange(SECTORS - sectors + 1)
        kind = draw.choices(("write", "read", "discard", "flush"), (12, 2, 2, 1))[0]
        if kind == "flush":
            world.send(rq(Op.FLUSH_DISKCACHE, id=number))
        elif kind == "discard":
            world.send(discard(first, sectors, id=number))
        else:
            pages = range(number * PAGES_EACH, number * PAGES_EACH + (sectors + 7) // 8)
            for page in pages:
                world.data(page)[:] = draw.randbytes(16) * 256
            segments = [world.segment(page) for page in pages[:-1]]
            segments.append(world.segment(pages[-1], 0, (sectors - 1) % 8))
            world.send(rq(Op.WRITE if kind == "write" else Op.READ, first, *segments, id=number))

    def step(self) -> None:
        self._world.settle()
        self._free += [answer.id for answer in self._world.responses()]


class Order:
    """Two queues, a mirror, and who does what next."""

    def __init__(self, seed: int, *, target_fails: bool = False) -> None:
        self._draw = draw = random.Random(seed)
        disk = draw.randbytes(SIZE // 2) + bytes(SIZE // 2)
        self.lower = ByHand(draw, disk, draw.choice((0, 0, 20)))
        self.target = ByHand(draw, draw.randbytes(SIZE), 10 if target_fails else 0)
        self.lower.meanwhile = self.target.meanwhile = self.some_steps
        self.mirror = Mirror(self.lower, self.target)
        self._users: list[User] = []

    def run(self) -> None:
        with QueueWorld(self.mirror) as one, QueueWorld(self.mirror) as other:
            self._users = [User(world, self._draw) for world in (one, other)]
            for _ in range(60):
                self.some_steps()
                if self._draw.random() < 0.5:
                    self.mirror.copy(self._draw.choice((1, SIZE)))
            self.lower.meanwhile = self.target.meanwhile = nothing
            while any(user.waits for user in self._users):
                self._end_all()
            self.mirror.finish()

    def some_steps(self) -> None:
        for _ in range(self._draw.randrange(8)):
            choice = self._draw.randrange(4)
            if choice == 0:
                self.lower.end_one()
            elif choice == 1:
                self.target.end_one()
            else:
                user = self._draw.choice(self._users)
                if choice == 2:
                    user.send()
                user.step()

    def _end_all(self) -> None:
        while self.lower.end_one() or self.target.end_one():
            pass
        for user in self._users:
            user.step()


@pytest.mark.slow
def test_both_are_the_same_in_whatever_order_things_end() -> None:
    for seed in range(SEEDS):
        order = Order(seed)

        order.run()

        assert order.lower.memory.view == order.target.memory.view, seed


@pytest.mark.slow
def test_a_target_that_fails_keeps_nobody_waiting() -> None:
    failed = 0
    for seed in range(SEEDS):
        order = Order(seed, target_fails=True)
        try:
            order.run()
        except EngineError:
            failed += 1
        else:
            assert order.lower.memory.view == order.target.memory.view, seed

    assert failed > 0
