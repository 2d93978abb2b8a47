# SPDX-License-Identifier: Apache-2.0
"""A backend daemon of the simulated machine: the shipped `Server` in a process of its own."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, Final

from xvd.backend.server import Server
from xvd.backend.settings import Settings
from xvd.blkif.assignment import BackendAssignment
from xvd.dataplane.loop.thread import Queue
from xvd.engines.interface import Engine
from xvd.errors import XvdError
from xvd.sim.checkers import SECTOR
from xvd.sim.engine import SimEngine
from xvd.sim.prng import Prng
from xvd.sim.process import Process
from xvd.sim.storage import SimStorage

PATIENCE_S: Final = 5.0
"""For a disk to come to rest; storage that is drawn to take longer keeps the disk going."""


class BackProcess(Process):
    """Serves every disk that the toolstack assigns, until it loses the store or is asked to end."""

    over = False
    _server: Server | None = None
    _asked: asyncio.Event

    def begin(
        self, storage: SimStorage, settings: Settings, resized: Callable[[int], None]
    ) -> None:
        """Start the daemon."""
        self._storage = storage
        self._asked = asyncio.Event()
        self._resized = resized
        self.spawn(self._main(settings))

    async def _main(self, settings: Settings) -> None:
        try:
            store = await self.machine.xenstore()
            self._server = Server(self.machine, store, self._open, settings=settings, runtime=self)
            with contextlib.suppress(XvdError):
                await self._server.start()
                lost = asyncio.ensure_future(self._server.wait())
                asked = asyncio.ensure_future(self._asked.wait())
                await asyncio.wait((lost, asked), return_when=asyncio.FIRST_COMPLETED)
                for waiting in (lost, asked):
                    waiting.cancel()
                await asyncio.gather(lost, asked, return_exceptions=True)
            await self._server.close()
            await store.close()
        finally:
            self.over = True

    async def _open(self, _assignment: BackendAssignment) -> Engine:
        self._storage.open()
        return SimEngine(self._storage, self._resized)

    @property
    def serves(self) -> bool:
        """Whether it has a disk."""
        return self._server is not None and bool(self._server.devices)

    @property
    def idle(self) -> bool:
        """Whether it is up, and has no disk."""
        return self.alive and self._server is not None and not self.serves

    def ask_to_end(self) -> None:
        """Ask it to end, as SIGTERM does."""
        self._asked.set()

    @property
    def halted(self) -> bool:
        """Whether its disk takes no requests, by somebody's wish or for want of its storage."""
        devices = self._server.devices.values() if self._server is not None else ()
        return any(device.disk.paused or device.hold.why for device in devices)

    def change(self, wish: str, sectors: int, prng: Prng) -> None:
        """Change what an administrator may under a running daemon: "set", "resize", "pause",
        "resume", "swap", or "abandon": swap and wait for nothing."""
        if self._server is None:
            return
        if wish == "set":
            name = prng.choose(("max_persistent_grants", "max_buffer_pages"))
            on_error = prng.choose(("report", "hold"))
            self._server.change([f"{name}={prng.choose((1, 40, 1056))}", f"on_error={on_error}"])
        elif self.serves:
            [device] = self._server.devices.values()
            work: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
                "resize": lambda: device.disk.resize(sectors * SECTOR),
                "pause": lambda: device.life.pause(PATIENCE_S),
                "resume": device.life.resume,
                "swap": lambda: device.life.swap("other", PATIENCE_S),
                "abandon": lambda: device.life.swap("other", PATIENCE_S, abandon=True),
            }
            self.spawn(self._try(work[wish]))

    def has_left(self, queue: Queue) -> None:
        """See `Process.has_left`: from now on its storage is another than the disk's."""
        for device in self._server.devices.values() if self._server is not None else ():
            if (connection := device.disk.connection) is not None:
                for link, channel in zip(connection.links, connection.channels, strict=False):
                    if link.queue is queue:
                        self._storage.leave(channel)

    def go_on(self) -> None:
        """Let a paused disk go on."""
        if self._server is not None and any(d.disk.paused for d in self._server.devices.values()):
            self.change("resume", 0, Prng(0))

    @staticmethod
    async def _try(work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        with contextlib.suppress(XvdError, OSError):
            await work()

    def die(self) -> None:
        """Die as by SIGKILL."""
        for device in self._server.devices.values() if self._server is not None else ():
            if device.disk.connection is not None:
                for link in device.disk.connection.links:
                    link.queue.abandon()
                    link.release()
        self.kill()
