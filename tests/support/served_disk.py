# SPDX-License-Identifier: Apache-2.0
"""A disk behind a whole emulated machine, bare or exported by NBD, for tests of any kind.

`served_disk` runs storage, backend, ring, frontend and export in an event loop of a thread of its
own. When it ends, everything that the machine has given out must have come back.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from xvd.backend.server import Server
from xvd.blkif.nodes import BackendAssignment
from xvd.engines.interface import Engine
from xvd.engines.uri import open_engine
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
        kind, image = assignment.image_format, assignment.image
        uri = image if kind == "raw" else f"{kind}:{image}"
        return await asyncio.to_thread(
            open_engine, uri, read_only=not assignment.writable, layers=layers
        )

    return open_storage


@contextlib.asynccontextmanager
async def emulated_disk(
    target: str, *, options: str = "", layers: Sequence[str] = ()
) -> AsyncIterator[Disk]:
    """A guest's disk on the storage `target`, connected; `options` are xl's (``ro``)."""
    host = EmulatedHost()
    async with host:
        backend = host.machine(Domid(0))
        store = await backend.xenstore()
        host.create_domain(Domid(1))
        await create_guest(store, Domid(1), "guest")
        server = Server(backend, store, storage_opener(layers))
        await server.start()
        vbd = await attach(store, Domid(1), parse_xl_disk(f"vdev=xvda,{options}target={target}"))
        guest = host.machine(Domid(1))
        guest_store = await guest.xenstore()
        disk = await Disk.open(guest, guest_store, f"device/vbd/{vbd.vdev}")
        try:
            yield disk
        finally:
            await disk.close()
            await detach(store, vbd)
            await server.close()
            await guest_store.close()
            await store.close()
            guest.close()
            backend.close()
            books = host.host.books()
    assert not any(books.values()), f"not given back: {books}"


@dataclass
class Served:
    """An export that runs in another thread, and the way to its loop."""

    uri: str
    socket: Path
    server: NbdServer
    disk: Disk
    loop: asyncio.AbstractEventLoop

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
) -> Iterator[Served]:
    """Export a disk on a unix socket in `directory` as long as the block runs."""
    failures: list[BaseException] = []
    ready = threading.Event()
    holder: list[tuple[Served, asyncio.Event]] = []

    async def serve() -> None:
        async with emulated_disk(target, options=options, layers=layers) as disk:
            async with NbdServer(disk, name=name, description=description) as server:
                path = directory / "nbd.sock"
                uri = await server.listen_unix(path)
                stop = asyncio.Event()
                served = Served(uri, path, server, disk, asyncio.get_running_loop())
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
