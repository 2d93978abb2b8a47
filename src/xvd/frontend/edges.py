# SPDX-License-Identifier: Apache-2.0
"""Writes that change parts of blocks: they are a read and a write of the blocks at their edges, and
a write of what lies between. Meanwhile no other write touches those blocks."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

from xvd.blkif.abi import Op
from xvd.frontend.clients import DiskClients
from xvd.frontend.pending import Pending
from xvd.types import RING_SECTOR_SIZE


class Blocks(Protocol):
    """What is written to, in blocks."""

    @property
    def logical_block_size(self) -> int:
        """Bytes."""

    def blocks_of(self, offset: int, length: int) -> tuple[int, int]:
        """Return the blocks that a range of bytes touches, as (first sector, sectors)."""


class Edges:
    """The changes of whole blocks that are under way on one disk.

    changes: (first sector, the one behind the last, what does it); mostly none, and then nobody has
    to wait.
    """

    def __init__(self, pending: Pending, clients: DiskClients) -> None:
        self._pending = pending
        self._clients = clients
        self.changes: list[tuple[int, int, asyncio.Task[None]]] = []

    async def wait(self, first: int, end: int) -> None:
        """Wait for every unaligned write in progress that touches these sectors."""

        def touches(a: int, b: int) -> bool:
            return a < end and first < b

        while waiting := [w for a, b, w in self.changes if touches(a, b) and not w.done()]:
            await asyncio.wait(waiting)

    async def write(self, disk: Blocks, offset: int, data: memoryview) -> None:
        """Read the blocks at the edges, change them, and write all."""
        first, sectors = disk.blocks_of(offset, len(data))
        await self.hold(first, first + sectors, partial(self._read_and_write, disk, offset, data))

    async def hold(self, first: int, end: int, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work` while no other write touches these sectors, which are whole blocks."""
        await self.wait(first, end)
        change = asyncio.create_task(self._change(first, end, work))
        entry = (first, end, change)
        self.changes.append(entry)
        change.add_done_callback(lambda _: self.changes.remove(entry))
        # A caller that gives up does not end it: what is on the ring would still be written, and
        # over the next writer's data in these blocks.
        await asyncio.shield(change)

    async def _change(self, first: int, end: int, work: Callable[[], Awaitable[None]]) -> None:
        """Call it when the writes on these blocks have ended; new ones wait meanwhile."""
        async with self._clients.kept_off(first, end):
            for done in self._pending.writes_on(first, end):
                await asyncio.wait([done])
            await work()

    async def _read_and_write(self, disk: Blocks, offset: int, data: memoryview) -> None:
        """Read the blocks at the edges, change them, write."""
        reads, writes, changes = [], [], []
        for at, piece in _pieces(disk.logical_block_size, offset, data):
            start, sectors = disk.blocks_of(at, len(piece))
            if sectors * RING_SECTOR_SIZE == len(piece):
                writes.append((start, sectors, piece))
                continue
            block = memoryview(bytearray(sectors * RING_SECTOR_SIZE))
            reads.append((start, sectors, block))
            writes.append((start, sectors, block))
            changes.append((block, at - start * RING_SECTOR_SIZE, piece))
        await _all([self._pending.run(Op.READ, *one) for one in reads])
        for block, skip, piece in changes:
            block[skip : skip + len(piece)] = piece
        # Submitted together they are one request, if they fit.
        await _all([self._pending.run(Op.WRITE, *one) for one in writes])


def _pieces(block: int, offset: int, data: memoryview) -> list[tuple[int, memoryview]]:
    """`data` cut at its first and its last block boundary: only edges are parts of blocks."""
    end = offset + len(data)
    inner, outer = -(-offset // block) * block, end // block * block
    cuts = [offset, inner, outer, end] if inner <= outer else [offset, end]
    pairs = pairwise(cuts)
    return [(a, data[a - offset : b - offset]) for a, b in pairs if a < b]


async def _all(work: list[Coroutine[Any, Any, None]]) -> None:
    """Wait for all of them, then raise what the first that failed has raised."""
    for outcome in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
