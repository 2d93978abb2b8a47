# SPDX-License-Identifier: Apache-2.0
"""Users of a disk who read and write at random and know what they wrote."""

import asyncio
import random

from rig_disk import until

from xvd.frontend.disk import Disk

BLOCK = 4096


class Content:
    """What a disk's blocks hold, for one who writes and reads them at random."""

    def __init__(self, disk: Disk, seed: int, first: int, blocks: int) -> None:
        self._disk = disk
        self._random = random.Random(seed)
        self._first = first
        self.steps = 0
        self.blocks = [bytes(BLOCK)] * blocks

    async def step(self) -> None:
        self.steps += 1
        block, count = self._random.randrange(len(self.blocks) - 3), self._random.randrange(1, 4)
        at = (self._first + block) * BLOCK
        kind = self._random.random()
        if kind < 0.05:
            await self._disk.flush()
        elif kind < 0.5:
            data = [self._random.randbytes(BLOCK) for _ in range(count)]
            await self._disk.write(at, b"".join(data))
            self.blocks[block : block + count] = data
        else:
            assert await self._disk.read(at, count * BLOCK) == b"".join(
                self.blocks[block : block + count]
            )

    async def check(self) -> None:
        found = await self._disk.read(self._first * BLOCK, len(self.blocks) * BLOCK)
        assert found == b"".join(self.blocks)


def contents_of(disk: Disk, size: int, users: int) -> list[Content]:
    """What each of some users has of so many bytes of a disk."""
    each = size // BLOCK // users
    return [Content(disk, seed, seed * each, each) for seed in range(users)]


async def load(contents: list[Content], stop: asyncio.Event) -> None:
    """Read and write until told to stop, and check everything."""

    async def use(content: Content) -> None:
        while not stop.is_set():
            await content.step()
        await content.check()

    await asyncio.gather(*map(use, contents))


async def advances(contents: list[Content], steps: int) -> None:
    """Wait for every user to have gone on so far."""
    goals = [content.steps + steps for content in contents]
    reached = list(zip(contents, goals, strict=True))
    await until(lambda: all(content.steps > goal for content, goal in reached), 30)
