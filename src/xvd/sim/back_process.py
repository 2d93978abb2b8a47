# SPDX-License-Identifier: Apache-2.0
"""A backend daemon of the simulated machine: the shipped `Server` in a process of its own."""

import asyncio
import contextlib
import errno
from collections.abc import Callable, Coroutine
from typing import Any, Final

from xvd.backend.copies import Kind, Phase
from xvd.backend.device import Device
from xvd.backend.server import Server
from xvd.backend.settings import Settings
from xvd.blkif.assignment import BackendAssignment
from xvd.dataplane.loop.thread import Queue
from xvd.engines.changes import TrackedChannel
from xvd.engines.interface import Channel, Engine
from xvd.errors import EngineError, XvdError
from xvd.sim.checkers import SECTOR
from xvd.sim.copy_checks import NAME
from xvd.sim.engine import SimEngine
from xvd.sim.prng import Prng
from xvd.sim.process import Process
from xvd.sim.storage import SimStorage
from xvd.sim.storages import Storages, other_way

PATIENCE_S: Final = 5.0
"""For a disk to come to rest; storage that is drawn to take longer keeps the disk going."""
_LOOKS_S: Final = 0.5
"""From one look at whether storage that hangs can be opened to the next."""


class BackProcess(Process):
    """Serves every disk that the toolstack assigns, until it loses the store or is asked to end."""

    over = False
    _server: Server | None = None
    _moving: asyncio.Task[None] | None = None
    _seen: Device | None = None
    _asked: asyncio.Event

    def begin(
        self,
        storages: Storages,
        settings: Settings,
        resized: Callable[[SimStorage, int], None],
        meanwhile: Callable[[], int],
    ) -> None:
        """Start the daemon. resized, meanwhile: as of `SimEngine`."""
        self._storages = storages
        self._asked = asyncio.Event()
        self._resized = resized
        self._others_go_on = meanwhile
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

    async def _open(self, assignment: BackendAssignment) -> Engine:
        while self._storages.hangs:  # noqa: ASYNC110  its time is no event loop's
            await asyncio.sleep(_LOOKS_S)
        storage = self._storages.open(assignment.image)
        name = self._storages.name_of(assignment.image)
        return SimEngine(storage, name, self._resized, self._meanwhile)

    def _meanwhile(self) -> int:
        """Let others go on before a call; the process may die then, and its thread with it."""
        one_in = self._others_go_on() if self.alive else 0
        if not self.alive:
            raise EngineError(errno.EIO, "the process has died")
        return one_in

    @property
    def serves(self) -> bool:
        """Whether it has a disk."""
        return self._server is not None and bool(self._server.devices)

    @property
    def device(self) -> Device | None:
        """Its disk, while the storage of that is open: also when the server has let it go already,
        and it ends what it had begun."""
        if not self.alive:
            return None
        devices = self._server.devices.values() if self._server is not None else ()
        known = (*devices, *filter(None, (self._seen,)))
        self._seen = next((one for one in known if one.disk.opened is not None), None)
        return self._seen

    @property
    def copies(self) -> bool:
        """Whether its disk is being copied."""
        return self.device is not None and bool(self.device.life.held_by)

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
        "resume", "swap", or "abandon": swap and wait for nothing; "mirror", "pivot", "backup" or
        "incremental" one, "cancel" either, "forget" what has changed."""
        if self._server is None:
            return
        if wish == "set":
            name = prng.choose(("max_persistent_grants", "max_buffer_pages"))
            on_error = prng.choose(("report", "hold"))
            self._server.change([f"{name}={prng.choose((1, 40, 1056))}", f"on_error={on_error}"])
        elif self.serves:
            [device] = self._server.devices.values()
            if wish in ("swap", "abandon") and self.copies:
                return  # it would wait, and then bring back what the disk has left meanwhile
            work: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
                "resize": lambda: device.disk.resize(sectors * SECTOR),
                "pause": lambda: device.life.pause(PATIENCE_S),
                "resume": device.life.resume,
                "swap": lambda: device.life.swap(other_way(self._image), PATIENCE_S),
                "abandon": lambda: device.life.swap(
                    other_way(self._image), PATIENCE_S, abandon=True
                ),
                "mirror": lambda: device.copies.mirror(self._storages.new_image()),
                "pivot": lambda: device.copies.pivot(PATIENCE_S),
                "backup": lambda: device.copies.backup(self._storages.new_image()),
                "incremental": lambda: device.copies.backup(self._last_backup(device), NAME),
                "cancel": device.copies.cancel,
                "forget": lambda: device.copies.forget(NAME),
            }
            self.spawn(self._try(work[wish]))

    @property
    def _image(self) -> str:
        return self._storages.image

    def _last_backup(self, device: Device) -> str:
        """Where the last backup of the name is, to be brought up to date; or a new place."""
        known = device.tracking.names.get(NAME)
        last = (
            None
            if known is None
            else device.tracking.last(NAME, self._storages.disk.sectors * SECTOR)
        )
        return self._storages.new_image() if last is None else last.image

    def has_left(self, queue: Queue) -> None:
        """See `Process.has_left`: from now on its storage is another than the disk's."""
        for device in self._server.devices.values() if self._server is not None else ():
            if (connection := device.disk.connection) is not None:
                for link, channel in zip(connection.links, connection.channels, strict=False):
                    if link.queue is queue:
                        self._storages.leave(_at_the_storage(channel))

    def go_on(self) -> None:
        """Let a paused disk go on, and one that is the same as its mirror move there."""
        if self._server is not None and any(d.disk.paused for d in self._server.devices.values()):
            self.change("resume", 0, Prng(0))
        if (device := self.device) is None:
            return
        job = device.copies.job
        ready = job is not None and job.kind is Kind.MIRROR and job.phase is Phase.READY
        if ready and (self._moving is None or self._moving.done()):
            self._moving = self.spawn(self._try(lambda: device.copies.pivot(PATIENCE_S)))

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


def _at_the_storage(channel: Channel) -> Channel:
    """The channel behind one that notes what changes."""
    return channel.lower if isinstance(channel, TrackedChannel) else channel
