# SPDX-License-Identifier: Apache-2.0
"""Storage as a `Disk` in one call: an emulated host with one guest, all in this process.

`emulated` is for code with an event loop and `open_image` for code without one; `served` is what
both, and ``xvd serve``, are made of.
"""

import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import NamedTuple

from xvd.backend.budget import Budget
from xvd.backend.device import Device
from xvd.backend.server import Server
from xvd.backend.settings import Settings
from xvd.blkif.assignment import BackendAssignment
from xvd.engines.interface import Engine
from xvd.engines.uri import open_engine
from xvd.errors import XvdError
from xvd.frontend.disk import Disk
from xvd.frontend.settings import Settings as FrontSettings
from xvd.frontend.sync import SyncDisk
from xvd.machine.emulated.service import EmulatedHost
from xvd.toolstack.vbd import attach, create_guest, detach
from xvd.toolstack.xldisk import XlDisk
from xvd.types import DOM0, Domid
from xvd.xenbus.runner import in_own_thread

GUEST = Domid(1)
"""The one guest."""


class Served(NamedTuple):
    """Both ends of a disk."""

    disk: Disk
    device: Device


@contextlib.asynccontextmanager
async def served(
    engine: Engine,
    description: XlDisk,
    *,
    settings: Settings | None = None,
    front: FrontSettings | None = None,
    budget: Budget | None = None,
) -> AsyncIterator[Served]:
    """A disk of `GUEST` on `engine`, connected, as long as the block runs.

    The backend closes the engine when it has taken it; to close it once more does no harm.
    """

    async def storage(_: BackendAssignment) -> Engine:
        return engine

    async with EmulatedHost() as host, contextlib.AsyncExitStack() as stack:
        back = host.machine(DOM0)
        store = await back.xenstore()
        stack.push_async_callback(store.close)
        host.create_domain(GUEST)
        await create_guest(store, GUEST, "guest")
        backend = Server(back, store, storage, settings=settings, budget=budget)
        await backend.start()
        stack.push_async_callback(backend.close)
        vbd = await attach(store, GUEST, description)
        machine = host.machine(GUEST)
        guest_store = await machine.xenstore()
        stack.push_async_callback(guest_store.close)
        path = f"device/vbd/{vbd.vdev}"
        async with await Disk.open(machine, guest_store, path, settings=front) as disk:
            yield Served(disk, backend.devices[f"backend/vbd/{GUEST}/{vbd.vdev}"])
        with contextlib.suppress(OSError, XvdError):  # the host ends in any case
            await detach(store, vbd)


def _uri(storage: str | os.PathLike[str]) -> str:
    """Text is a URI or a path, as everywhere; a path object is a path, whatever it looks like."""
    return storage if isinstance(storage, str) else f"file:{os.fspath(storage)}"


@contextlib.asynccontextmanager
async def emulated(
    storage: str | os.PathLike[str],
    *,
    read_only: bool = False,
    layers: Sequence[str] = (),
    settings: Settings | None = None,
    front: FrontSettings | None = None,
) -> AsyncIterator[Disk]:
    """Serve storage on an emulated host of this process; the block has its connected `Disk`.

    storage: a path, or an engine URI (``disk.img``, ``file:PATH``, ``raw:PATH``, ``memory:1G``,
    ``null:1G``). read_only: refuse writes, by EROFS. layers: as of ``xvd serve --layer``, the
    first nearest to the guest. settings, front: those of the backend and of the frontend.

    Raises `ConfigError` for what cannot be understood and `EngineError`, an OSError, for storage
    that cannot be opened or is in use; of the disk's own errors see `Disk`. To be used in the event
    loop's thread. At the end, also by an exception, all is given back: the disk is closed when
    its last operation is done, then the backend, the image with its lock, and the host. What is
    to survive a crash is flushed before that.
    """
    user = f"{GUEST}/xvda"
    opening = partial(open_engine, _uri(storage), read_only=read_only, layers=layers, user=user)
    engine = await in_own_thread(opening)
    try:
        disk = XlDisk(target=os.fspath(storage), vdev="xvda", writable=not read_only)
        async with served(engine, disk, settings=settings, front=front) as both:
            yield both.disk
    finally:
        await in_own_thread(engine.close)


def open_image(
    storage: str | os.PathLike[str],
    *,
    read_only: bool = False,
    layers: Sequence[str] = (),
    settings: Settings | None = None,
    front: FrontSettings | None = None,
) -> SyncDisk:
    """Serve storage without an event loop: ``with open_image("disk.img") as disk:``.

    The arguments are those of `emulated`. The host lives in a thread of its own until
    `SyncDisk.close`, which the block's end calls; any number of threads may use the disk meanwhile.
    """
    stack = contextlib.AsyncExitStack()

    async def connect() -> Disk:
        return await stack.enter_async_context(
            emulated(storage, read_only=read_only, layers=layers, settings=settings, front=front)
        )

    return SyncDisk(connect, release=stack.aclose)
