# SPDX-License-Identifier: Apache-2.0
"""What is served as a disk: its storage and its connection while there are such, and what may be
done with them while they are in use."""

import asyncio
from collections.abc import Callable
from typing import Final

from xvd.backend.budget import Room
from xvd.backend.connection import Connection
from xvd.backend.counters import BackCounters
from xvd.backend.groups import DiskLimits, Groups
from xvd.backend.opened import Opened
from xvd.backend.settings import Settings
from xvd.blkif.features import BackendFeatures
from xvd.engines.interface import Engine
from xvd.errors import ConfigError
from xvd.xenbus.log import DeviceLog
from xvd.xenbus.runner import Runtime

_LOGGED: Final = ("oo_req", "rd_req", "wr_req", "f_req", "ds_req", "persistent_grants")


class ServedDisk:
    """One disk. For the event loop's thread, but for `has_another_size`.

    room: its part of what this host has. groups: those that it may be in. resized: called when the
    disk has another size.
    """

    def __init__(
        self,
        log: DeviceLog,
        room: Room,
        groups: Groups,
        settings: Settings,
        runtime: Runtime,
        *,
        resized: Callable[[], None],
    ) -> None:
        self.log = log
        self.room = room
        self.limits = DiskLimits(groups)
        self.settings = settings
        self.opened: Opened | None = None
        self.connection: Connection | None = None
        """The connected frontend's, while there is one."""
        self.sizing = asyncio.Lock()
        """Whoever resizes the storage has it, or lets nobody do so."""
        self.paused = False
        """Whether it takes no requests, by somebody's wish."""
        self.totals = BackCounters()
        """What was counted over the connections that have ended."""
        self._runtime = runtime
        self._resized = resized
        self.throttles = self.limits.apply(settings)

    # ---- What it has ----

    @property
    def storage(self) -> Opened:
        """The open storage; to be asked for where the disk's state says that there is one."""
        assert self.opened is not None
        return self.opened

    @property
    def engine(self) -> Engine | None:
        """The storage, while it is open."""
        return self.opened.engine if self.opened else None

    @property
    def features(self) -> BackendFeatures | None:
        """The features that are offered, or were agreed on."""
        return self.opened.features if self.opened else None

    @property
    def mode(self) -> str:
        """How data is moved: "grant copy", "mapping" (for each request) or "persistent grants"."""
        otherwise = "grant copy" if self.settings.copying else "mapping"
        return otherwise if self.connection is None else self.connection.mode

    # ---- How it comes and goes ----

    def has_opened(self, engine: Engine, features: BackendFeatures) -> None:
        """The storage is open."""
        self.opened = Opened(
            engine,
            features,
            self.log,
            self._runtime,
            set_capacity=self._set_capacity,
            resized=self._resized,
        )

    def _set_capacity(self, sectors: int) -> None:
        if self.connection is not None:
            self.connection.set_capacity(sectors)

    def has_ended(self, connection: Connection) -> None:
        """Note that the connection has ended."""
        self.connection = None
        self.totals = self.totals + connection.counters().over()

    async def disconnect(self) -> None:
        """Finish what is in flight and give everything back."""
        if self.connection is not None:
            await self.connection.end()

    async def close(self) -> None:
        """Close the storage."""
        if self.opened is not None:
            opened, self.opened = self.opened, None
            await opened.close()

    # ---- While it is in use ----

    def apply(self, settings: Settings) -> None:
        """Go by other settings: at once as far as a connection can, and for the rest from the next
        offer on."""
        self.settings = settings
        self.throttles = self.limits.apply(settings)
        if self.connection is not None:
            self.connection.limit(self.throttles)
            plan = self.connection.plan
            pages = plan.config.ring_pages
            self.connection.apply(self.room.change(plan.lease, pages, settings))

    def squeeze(self) -> None:
        """Give back memory that is not in use, and keep none for the time that is set."""
        if self.connection is not None:
            self.connection.squeeze(self.settings.buffer_squeeze_duration_ms / 1000)

    async def resize(self, size: int | None = None, *, shrink: bool = False) -> int:
        """Give the disk `size` bytes, or let it follow its storage; its 512-byte sectors then.

        The guest is told while it runs. shrink: also if storage that is followed is smaller than
        the disk. Raises `EngineError`, or `ConfigError` where the storage is not open, or smaller.
        """
        # Who goes away leaves the call, which may still change the size.
        return await asyncio.shield(asyncio.ensure_future(self._resize(size, shrink=shrink)))

    async def _resize(self, size: int | None, *, shrink: bool) -> int:
        async with self.sizing:
            if self.opened is None:
                raise ConfigError(f"{self.log.disk}: its storage is not open")
            return await self.opened.resize(size, shrink=shrink)

    def has_another_size(self) -> bool:
        """Whether a connected disk has not the size of its storage. In any thread: it may hang."""
        opened = self.opened
        return self.connection is not None and opened is not None and opened.has_another_size()

    async def follow_size(self) -> None:
        """Let a connected disk grow with its storage; a smaller one is an error to be told."""
        if self.connection is not None and self.opened is not None:
            await self.opened.follow_size()

    # ---- Figures ----

    def log_figures(self) -> None:
        """Log the counters in one line, if ``log_stats`` is set."""
        if self.settings.log_stats:
            counts = self.counters().numbers()
            self.log.info(
                "%s", ", ".join(f"{name} {counts[name]}" for name in _LOGGED), event="figures"
            )

    def counters(self) -> BackCounters:
        """Return the counters since the disk came up, over all connections."""
        if self.connection is None:
            return self.totals
        return self.totals + self.connection.counters()
