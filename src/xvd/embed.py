# SPDX-License-Identifier: Apache-2.0
"""Storage as a disk in one call: an emulated host with one guest, all in this process.

`EmulatedHost.serving` is for programs, with an event loop or without one; `hosted` is what it, and
``xvd serve``, are made of.
"""

import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from functools import partial
from types import TracebackType
from typing import NamedTuple

from xvd.backend.budget import Budget
from xvd.backend.device import Device
from xvd.backend.server import Server
from xvd.backend.settings import Settings
from xvd.blkif.assignment import BackendAssignment
from xvd.disks import Disk, SyncDisk
from xvd.engines.interface import Engine
from xvd.engines.uri import open_engine, with_layers
from xvd.errors import ConfigError, XvdError
from xvd.frontend.settings import Settings as FrontSettings
from xvd.machine.emulated import service
from xvd.toolstack.vbd import attach, create_guest, detach
from xvd.toolstack.xldisk import XlDisk
from xvd.types import DOM0, Domid
from xvd.xenbus.runner import in_own_thread

GUEST = Domid(1)
"""The one guest."""


class EmulatedHost(service.EmulatedHost):
    """An emulated Xen host with domain 0: ``async with EmulatedHost() as host:``.

    It has grant tables, event channels and a xenstore, all in this process; `listen` lets other
    processes join it, as they join ``xvd host DIR``. Everything is called in the event loop's
    thread. For one disk on it, already connected, see `serving`.
    """

    @staticmethod
    def serving(
        storage: str | os.PathLike[str] | Engine,
        *,
        read_only: bool = False,
        layers: Sequence[str] = (),
        settings: Settings | None = None,
        front: FrontSettings | None = None,
    ) -> "Serving":
        """Serve storage as a guest's disk; the block has the disk, connected.

        ``async with EmulatedHost.serving("disk.img") as disk:`` gives a `Disk`, and
        ``with EmulatedHost.serving("disk.img") as disk:`` a `SyncDisk`, whose host lives in a
        thread of its own.

        storage: a path, an engine URI as of ``xvd serve`` (``qcow2:disk.qcow2``, ``memory:1G``), or
        an `Engine` of your own, which is closed at the end. read_only: refuse writes, by EROFS.
        layers: as of ``xvd serve --layer``, the first nearest to the guest. settings, front: those
        of the backend and of the frontend.

        Entering raises `ConfigError` for what cannot be understood and `EngineError`, an OSError,
        for storage that cannot be opened or is in use. At the end, also by an exception, all is
        given back: the disk is closed when its last operation is done, then the backend, the image
        with its lock, and the host. What is to survive a crash is flushed before that.
        """
        return Serving(storage, read_only, layers, settings, front)


class Serving:
    """Storage that is served as long as a block runs; made by `EmulatedHost.serving`.

    One block after the other, unless the storage is an `Engine`, which lasts for one; entering it
    within its own block raises `ConfigError`.
    """

    def __init__(
        self,
        storage: str | os.PathLike[str] | Engine,
        read_only: bool,
        layers: Sequence[str],
        settings: Settings | None,
        front: FrontSettings | None,
    ) -> None:
        self._enter = partial(_serve, storage, read_only, layers, settings, front)
        self._stack = contextlib.AsyncExitStack()
        self._without_loop: SyncDisk | None = None
        self._busy = False

    async def __aenter__(self) -> Disk:
        if self._busy:
            raise ConfigError("this is served already; call EmulatedHost.serving for each block")
        self._busy = True
        try:
            return await self._stack.enter_async_context(self._enter())
        except BaseException:
            self._busy = False
            raise

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._leave()

    async def _leave(self) -> None:
        try:
            await self._stack.aclose()
        finally:
            self._busy = False

    def __enter__(self) -> SyncDisk:
        self._without_loop = SyncDisk(self.__aenter__, release=self._leave)
        return self._without_loop

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._without_loop is not None:
            self._without_loop.close()


class Served(NamedTuple):
    """Both ends of a disk."""

    disk: Disk
    device: Device


@contextlib.asynccontextmanager
async def hosted(
    storages: Sequence[tuple[Engine, XlDisk]],
    *,
    settings: Settings | None = None,
    front: FrontSettings | None = None,
    budget: Budget | None = None,
) -> AsyncIterator[list[Served]]:
    """The disks of `GUEST` on these engines, connected, as long as the block runs.

    The backend closes an engine when it has taken it; to close it once more does no harm.
    """
    engines = {description.number: engine for engine, description in storages}

    async def storage(assignment: BackendAssignment) -> Engine:
        return engines[int(assignment.frontend.rpartition("/")[2])]

    async with EmulatedHost() as host, contextlib.AsyncExitStack() as stack:
        back = host.machine(DOM0)
        store = await back.xenstore()
        stack.push_async_callback(store.close)
        host.create_domain(GUEST)
        await create_guest(store, GUEST, "guest")
        backend = Server(back, store, storage, settings=settings, budget=budget)
        await backend.start()
        stack.push_async_callback(backend.close)
        machine = host.machine(GUEST)
        guest_store = await machine.xenstore()
        stack.push_async_callback(guest_store.close)
        vbds = [await attach(store, GUEST, description) for _, description in storages]
        ends = []
        async with contextlib.AsyncExitStack() as disks:
            for vbd in vbds:
                path = f"device/vbd/{vbd.vdev}"
                opening = await Disk.open(machine, guest_store, path, settings=front)
                disk = await disks.enter_async_context(opening)
                ends.append(Served(disk, backend.devices[f"backend/vbd/{GUEST}/{vbd.vdev}"]))
            yield ends
        for vbd in vbds:
            with contextlib.suppress(OSError, XvdError):  # the host ends in any case
                await detach(store, vbd)


def _open(
    storage: str | os.PathLike[str] | Engine, read_only: bool, layers: Sequence[str]
) -> Engine:
    """Text is a URI or a path, as everywhere; a path object is a path, whatever it looks like."""
    if isinstance(storage, Engine):
        return with_layers(storage, layers, read_only=read_only)
    uri = storage if isinstance(storage, str) else f"file:{os.fspath(storage)}"
    return open_engine(uri, read_only=read_only, layers=layers, user=f"{GUEST}/xvda")


@contextlib.asynccontextmanager
async def _serve(
    storage: str | os.PathLike[str] | Engine,
    read_only: bool,
    layers: Sequence[str],
    settings: Settings | None,
    front: FrontSettings | None,
) -> AsyncIterator[Disk]:
    engine = await in_own_thread(partial(_open, storage, read_only, layers))
    try:
        name = type(storage).__name__ if isinstance(storage, Engine) else os.fspath(storage)
        disk = XlDisk(target=name, vdev="xvda", writable=not read_only)
        async with hosted([(engine, disk)], settings=settings, front=front) as [both]:
            yield both.disk
    finally:
        await in_own_thread(engine.close)


def emulated(
    storage: str | os.PathLike[str],
    *,
    read_only: bool = False,
    layers: Sequence[str] = (),
    settings: Settings | None = None,
    front: FrontSettings | None = None,
) -> contextlib.AbstractAsyncContextManager[Disk]:
    """Serve storage with an event loop, as `EmulatedHost.serving` does."""
    return _serve(storage, read_only, layers, settings, front)


def open_image(
    storage: str | os.PathLike[str],
    *,
    read_only: bool = False,
    layers: Sequence[str] = (),
    settings: Settings | None = None,
    front: FrontSettings | None = None,
) -> SyncDisk:
    """Serve storage without an event loop, as `EmulatedHost.serving` does, until `SyncDisk.close`.

    What is entered is the disk itself: ``with open_image("disk.img") as disk:``.
    """
    return Serving(storage, read_only, layers, settings, front).__enter__()
