# SPDX-License-Identifier: Apache-2.0
"""A disk behind a whole emulated machine, bare or exported by NBD, for tests of any kind.

`served_disk` runs storage, backend, ring, frontend and export in an event loop of a thread of its
own. When it ends, everything that the machine has given out must have come back.
"""

import asyncio
import contextlib
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from xvd.backend.server import Server
from xvd.backend.settings import Settings
from xvd.blkif.assignment import BackendAssignment
from xvd.engines.interface import Engine
from xvd.engines.uri import open_engine, storage_uri
from xvd.export.nbd import NbdServer
from xvd.frontend.disk import Disk
from xvd.machine.emulated.service import EmulatedHost
from xvd.toolstack.vbd import attach, create_guest, detach
from xvd.toolstack.xldisk import parse_xl_disk
from xvd.types import Domid

T = TypeVar("T")

SMALL = 16 << 20
"""A size for disks that a test may fill, bytes."""


def storage_opener(layers: Sequence[str]) -> Callable[[BackendAssignment], Awaitable[Engine]]:
    async def open_storage(assignment: BackendAssignment) -> Engine:
        uri = storage_uri(assignment)
        return await asyncio.to_thread(
            open_engine, uri, read_only=not assignment.writable, layers=layers
        )

    return open_storage


class Rig:
    """The host, the backend and the frontend of one disk; all in the event loop's thread."""

    def __init__(self, host: EmulatedHost, layers: Sequence[str], state_dir: Path) -> None:
        self.host = host
        self._machine = host.machine(Domid(0))
        self._open_storage = storage_opener(layers)
        self._settings = Settings(state_dir=state_dir)  # journals: what a successor needs
        self._server: Server | None = None

    async def start(self, target: str, options: str) -> None:
        self._store = await self._machine.xenstore()
        self.host.create_domain(Domid(1))
        await create_guest(self._store, Domid(1), "guest")
        await self.start_backend()
        disk = parse_xl_disk(f"vdev=xvda,{options}target={target}")
        self._vbd = await attach(self._store, Domid(1), disk)
        self._guest = self.host.machine(Domid(1))
        self._guest_store = await self._guest.xenstore()
        path = f"device/vbd/{self._vbd.vdev}"
        self.disk = await Disk.open(self._guest, self._guest_store, path)

    @property
    def engine(self) -> Engine | None:
        """The disk's storage."""
        assert self._server is not None
        return self._server.device("1/51712").disk.engine

    async def start_backend(self) -> None:
        self._server = Server(
            self._machine, self._store, self._open_storage, settings=self._settings
        )
        await self._server.start()

    async def restart_backend(
        self, *, keep_journals: bool = True, between: Callable[[], object] = lambda: None
    ) -> None:
        """One backend goes, another comes; the guest's disk stays. between: called then."""
        assert self._server is not None
        await self._server.close()
        if not keep_journals and self._settings.state_dir is not None:
            for journal in self._settings.state_dir.glob("*/*"):
                journal.unlink()
        between()
        await self.start_backend()

    async def close(self) -> None:
        assert self._server is not None
        await self.disk.close()
        await detach(self._store, self._vbd)
        await self._server.close()
        await self._guest_store.close()
        await self._store.close()
        self._guest.close()
        self._machine.close()


@contextlib.asynccontextmanager
async def rigged_disk(
    target: str, *, options: str = "", layers: Sequence[str] = ()
) -> AsyncIterator[Rig]:
    """A guest's disk on the storage `target`, connected; `options` are xl's (``access=ro,``)."""
    with tempfile.TemporaryDirectory(prefix="xvd-state-") as state_dir:
        async with EmulatedHost() as host:
            rig = Rig(host, layers, Path(state_dir))
            await rig.start(target, options)
            try:
                yield rig
            finally:
                await rig.close()
                accounting = host.host.accounting()
    assert not any(accounting.values()), f"not given back: {accounting}"


@contextlib.asynccontextmanager
async def emulated_disk(
    target: str, *, options: str = "", layers: Sequence[str] = ()
) -> AsyncIterator[Disk]:
    """The disk of `rigged_disk`."""
    async with rigged_disk(target, options=options, layers=layers) as rig:
        yield rig.disk


@dataclass
class Served:
    """An export that runs in another thread, and the way to its loop."""

    uri: str
    socket: Path
    server: NbdServer
    rig: Rig
    loop: asyncio.AbstractEventLoop

    @property
    def disk(self) -> Disk:
        """The disk behind it; its calls belong to the loop."""
        return self.rig.disk

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something in the export's loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)


@contextlib.contextmanager
def served_disk(
    target: str,
    directory: Path,
    *,
    name: str = "",
    description: str = "",
    options: str = "",
    layers: Sequence[str] = (),
    at_hand: bool = False,
) -> Iterator[Served]:
    """Export a disk on a unix socket in `directory` as long as the block runs.

    at_hand: the export knows the disk's storage, as that of ``xvd serve`` does.
    """
    failures: list[BaseException] = []
    ready = threading.Event()
    holder: list[tuple[Served, asyncio.Event]] = []

    async def serve() -> None:
        async with rigged_disk(target, options=options, layers=layers) as rig:
            engine = rig.engine if at_hand else None
            async with NbdServer(
                rig.disk, name=name, description=description, storage=engine,
                tells_holes=engine is not None and engine.info.tells_holes,
            ) as server:  # fmt: skip
                path = directory / "nbd.sock"
                uri = await server.listen_unix(path)
                stop = asyncio.Event()
                served = Served(uri, path, server, rig, asyncio.get_running_loop())
                holder.append((served, stop))
                ready.set()
                await stop.wait()
            assert server.counters()["connected"] == 0

    def work() -> None:
        try:
            asyncio.run(serve())
        except BaseException as failure:
            failures.append(failure)
        finally:
            ready.set()

    thread = threading.Thread(target=work, name="served-disk")
    thread.start()
    ready.wait()
    try:
        if holder:
            yield holder[0][0]
    finally:
        if holder:
            served, stop = holder[0]
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                served.loop.call_soon_threadsafe(stop.set)
        thread.join()
        if failures:
            raise failures[0]
