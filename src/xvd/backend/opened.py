# SPDX-License-Identifier: Apache-2.0
"""A disk's storage while it is open: what the disk offers of it, and its size.

The size is the only thing of a disk that may change under a running guest. Whoever reads it or
changes it does so one at a time, in a thread of its own: storage may hang.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace

from xvd.backend.storage_log import StorageLog
from xvd.blkif.features import BackendFeatures
from xvd.engines.interface import Engine
from xvd.errors import ConfigError, XvdError
from xvd.types import RING_SECTOR_SIZE
from xvd.xenbus.log import DeviceLog
from xvd.xenbus.runner import InTurn, Runtime


class Opened:
    """The storage of one disk. For the event loop's thread, but for `has_another_size`.

    set_capacity: tells a connection, if there is one, what is out of range from now on. resized:
    called when `features` has another number of sectors.
    """

    def __init__(
        self,
        engine: Engine,
        features: BackendFeatures,
        log: DeviceLog,
        runtime: Runtime,
        *,
        set_capacity: Callable[[int], None],
        resized: Callable[[], None],
    ) -> None:
        self.engine = engine
        self.features = features
        """What the disk offers now; whoever negotiates changes it."""
        self.said = StorageLog(log)
        self._log = log
        self._set_capacity = set_capacity
        self._resized = resized
        self._sizing = asyncio.Lock()
        self._storage = InTurn(runtime)

    async def measure(self) -> None:
        """A frontend that connects is told the size that the storage has then, whatever it was."""
        async with self._sizing:
            self.features = replace(self.features, sectors=await self._measure())

    def agreed(self, features: BackendFeatures, *, resumed: bool) -> None:
        """Note what a frontend goes by. resumed: a predecessor may have promised more."""
        self.features = features
        promised = features.sectors * RING_SECTOR_SIZE
        if resumed and promised > self.engine.info.size:
            self.said.smaller(self.engine.info.size, promised)

    async def _measure(self) -> int:
        return await self._storage.call(self.engine.measure) // RING_SECTOR_SIZE

    def has_another_size(self) -> bool:
        """Whether the storage has not the size that the disk has. In any thread: it may hang."""
        with self._storage.lock:
            try:
                return self.engine.measure() // RING_SECTOR_SIZE != self.features.sectors
            except (OSError, XvdError):
                return False

    async def resize(self, size: int | None, *, shrink: bool) -> int:
        """Give the disk `size` bytes, or let it follow its storage; its 512-byte sectors then.

        shrink: also if storage that is followed is smaller than the disk. Raises `EngineError`, or
        `ConfigError` where the storage is smaller.
        """
        async with self._sizing:
            found = await self._resize(size, shrink=shrink)
        if found < (has := self.features.sectors):
            text = f"its storage has {found} sectors, the disk {has}; see --shrink"
            raise ConfigError(f"{self._log.disk}: {text}")
        return found

    async def follow_size(self) -> None:
        """Let the disk grow with its storage, as blkback does before each request.

        Where that became smaller, what is gone is an error, and no end that somebody wanted.
        """
        with contextlib.suppress(OSError, XvdError):
            async with self._sizing:
                await self._resize(None, shrink=False)
        self.said.examined(self.engine)

    async def _resize(self, size: int | None, *, shrink: bool) -> int:
        """The sectors that the storage has then; the disk has no fewer, unless it may shrink."""
        try:
            if size is not None:
                shrink = True
                if size < self.engine.info.size:
                    # Before what lies behind it goes; the guest is told when it has gone.
                    self._set_capacity(size // RING_SECTOR_SIZE)
                await self._storage.call(self.engine.resize, size)
        finally:
            found = await self._measure()
            if found >= self.features.sectors or shrink:
                self.engine.accept_size()
                self._accept(found)
        return found

    def _accept(self, sectors: int) -> None:
        self._set_capacity(sectors)
        if sectors == self.features.sectors:
            return
        self._log.info(
            "has %d sectors now, %d before", sectors, self.features.sectors, event="resized"
        )
        self.features = replace(self.features, sectors=sectors)
        self._resized()

    async def close(self) -> None:
        """Close the storage, when nobody measures it any more."""
        async with self._sizing:
            await self._storage.call(self.engine.close)
