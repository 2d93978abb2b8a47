# SPDX-License-Identifier: Apache-2.0
"""What a guest does with its disk, by the shipped `Disk`: random operations, each checked by a
model."""

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from functools import partial

from xvd.frontend.disk import Disk
from xvd.sim.checkers import SECTOR, ModelDisk, pattern
from xvd.sim.prng import Prng

_CHANGES = ("write", "fua", "discard")


@dataclass(slots=True, eq=False)
class _Change:
    first: int
    count: int


class DiskLoad:
    """Keeps up to `depth` operations outstanding. Changes in flight never overlap.

    A check that does not hold fails its task: the process's loop has it.
    """

    def __init__(self, prng: Prng, model: ModelDisk, *, depth: int, sectors_max: int) -> None:
        self._prng = prng
        self._model = model
        self._depth = depth
        self._sectors_max = sectors_max
        self._keys = 0
        self._changes: list[_Change] = []
        self._mix = {
            "read": prng.between(1, 5), "write": prng.between(1, 5), "flush": 1, "discard": 1,
            "fua": prng.below(2),
        }  # fmt: skip
        self.outstanding = 0
        self.finished = 0
        self.failed = 0

    def begin(self, disk: Disk, loop: asyncio.AbstractEventLoop) -> str:
        """Begin one more, if there is room for it; what."""
        if self.outstanding >= self._depth:
            return ""
        kind = self._prng.weighted(self._mix)
        sectors = disk.size // SECTOR
        count = self._prng.between(1, min(self._sectors_max, sectors))
        first = self._prng.below(sectors - count + 1)
        if kind in _CHANGES and self._overlaps(first, count):
            return ""
        if kind == "discard" and not disk.can_discard:
            return ""
        self._keys += 1
        self.outstanding += 1
        change = _Change(first, count) if kind in _CHANGES else None
        if change is not None:
            self._changes.append(change)
        work = getattr(self, f"_{kind}")(disk, self._keys, first, count)
        loop.create_task(work).add_done_callback(partial(self._is_over, change))
        return kind

    def _is_over(self, change: _Change | None, task: "asyncio.Task[None]") -> None:
        if task.cancelled():  # its process is dead, and `forget` was called
            return
        self.outstanding -= 1
        if change is not None:
            self._changes.remove(change)

    def forget(self) -> None:
        """Forget what is under way: whoever waited for it died."""
        self.outstanding = 0
        self._changes.clear()
        self._model.forget_users()

    def _overlaps(self, first: int, count: int) -> bool:
        return any(
            first < other.first + other.count and other.first < first + count
            for other in self._changes
        )

    async def _ends_well(self, work: Awaitable[object]) -> bool:
        try:
            await work
        except OSError:
            self.failed += 1
            return False
        finally:
            self.finished += 1
        return True

    # ---- The operations ----

    async def _read(self, disk: Disk, key: int, first: int, count: int) -> None:
        self._model.begin_read(key, first, count)
        data: bytes | None = None
        try:
            data = bytes(await disk.read(first * SECTOR, count * SECTOR))
        except OSError:
            self.failed += 1
        self.finished += 1
        self._model.end_read(key, data)

    async def _write(
        self, disk: Disk, key: int, first: int, count: int, *, fua: bool = False
    ) -> None:
        tag = self._model.new_tag()
        self._model.begin_write(tag, first, count)
        if fua:
            self._model.begin_flush(key)
        data = b"".join(pattern(tag, sector) for sector in range(first, first + count))
        done = await self._ends_well(disk.write(first * SECTOR, data, fua=fua))
        self._model.end_write(tag, first, count, acknowledged=done)
        if fua:
            durable = done and disk.can_flush
            self._model.end_flush(key, acknowledged=durable)
            if durable:
                self._model.settle(first, count)

    async def _fua(self, disk: Disk, key: int, first: int, count: int) -> None:
        await self._write(disk, key, first, count, fua=True)

    async def _flush(self, disk: Disk, key: int, _first: int, _count: int) -> None:
        self._model.begin_flush(key)
        done = await self._ends_well(disk.flush())
        # One that no backend does any more is a success and makes nothing durable.
        self._model.end_flush(key, acknowledged=done and disk.can_flush)

    async def _discard(self, disk: Disk, _key: int, first: int, count: int) -> None:
        self._model.begin_write(0, first, count)
        await self._ends_well(disk.discard(first * SECTOR, count * SECTOR))
