# SPDX-License-Identifier: Apache-2.0
"""Users of a disk whose storage is exchanged, who know what each block of each storage may hold."""

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from xvd.frontend.disk import Disk

T = TypeVar("T")

SIZE, BLOCK, USERS = 8 << 20, 4096, 8
BLOCKS = SIZE // BLOCK
ZEROS = bytes(BLOCK)


class Storages:
    """What each block of each storage may hold: one thing, or several where an operation was under
    way during an exchange and may have gone to either side."""

    def __init__(self, first: str) -> None:
        self._may_hold: dict[str, list[set[bytes]]] = {}
        self._has_been = [first]
        self._exchanging = False
        self.stalls: list[float] = []
        self.forget(first)

    def forget(self, name: str) -> None:
        self._may_hold[name] = [{ZEROS} for _ in range(BLOCKS)]

    async def exchange(self, name: str, swap: Callable[[], Awaitable[None]]) -> None:
        if name.startswith("memory") or name not in self._may_hold:
            self.forget(name)
        self._has_been.append(name)
        self._exchanging = True
        self.stalls.append(0.0)
        await swap()
        self._exchanging = False

    def stayed(self, name: str) -> None:
        """The last exchange has not come to be: the disk has this storage, as before it."""
        self._has_been.append(name)

    @property
    def _moment(self) -> int:
        """Of an exchange under way, the storage before it."""
        return len(self._has_been) - 1 - self._exchanging

    async def write(self, disk: Disk, block: int, data: bytes) -> None:
        since = self._moment
        await self._timed(disk.write(block * BLOCK, data))
        if since == len(self._has_been) - 1:
            self._may_hold[self._has_been[-1]][block] = {data}
            return
        for name in set(self._has_been[since:]):
            self._may_hold[name][block].add(data)

    async def read(self, disk: Disk, block: int) -> None:
        since = self._moment
        found = bytes(await self._timed(disk.read(block * BLOCK, BLOCK)))
        names = set(self._has_been[since:])
        assert any(found in self._may_hold[name][block] for name in names), (block, names)
        if len(names) == 1:
            self._may_hold[names.pop()][block] = {found}

    async def _timed(self, work: Awaitable[T]) -> T:
        began = time.monotonic()
        result = await work
        if self.stalls:
            self.stalls[-1] = max(self.stalls[-1], time.monotonic() - began)
        return result


async def use(disk: Disk, storages: Storages, user: int, stop: asyncio.Event) -> None:
    """Write and read blocks that nobody else has."""
    draw = random.Random(user)
    while not stop.is_set():
        block = draw.randrange(BLOCKS // USERS) * USERS + user
        if draw.random() < 0.5:
            await storages.write(disk, block, draw.randbytes(16) * (BLOCK // 16))
        else:
            await storages.read(disk, block)
    for block in range(user, BLOCKS, USERS):
        await storages.read(disk, block)


def told(stalls: Sequence[float]) -> str:
    """Stalls in words: the median and the longest."""
    if not stalls:
        return "none"
    return f"{1000 * statistics.median(stalls):.1f} ms, at most {1000 * max(stalls):.1f} ms"
