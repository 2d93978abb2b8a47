# SPDX-License-Identifier: Apache-2.0
"""A whole machine in one event loop: host, store, backend, guests and their disks.

It is emulated, or has the grants and event channels of real Xen (rig_xen.py).

`disk_world` gives everything back at its end, and the machine's accounting must show it.
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from rig_queue import NOTHING, SMALL
from rig_xen import HOST_SERVICE

from xvd.backend.budget import Budget
from xvd.backend.device import StorageOpener
from xvd.backend.server import Server
from xvd.backend.settings import Settings
from xvd.blkif.assignment import BackendAssignment
from xvd.engines.interface import Engine
from xvd.engines.uri import open_engine, storage_uri
from xvd.frontend.disk import Disk
from xvd.frontend.settings import Settings as FrontSettings
from xvd.machine.emulated.limits import Limits
from xvd.machine.emulated.machine import EmulatedMachine
from xvd.machine.emulated.service import EmulatedHost
from xvd.machine.xs.client import XenstoreClient
from xvd.toolstack.vbd import Vbd, attach, create_guest
from xvd.toolstack.xldisk import parse_xl_disk
from xvd.types import PAGE_SIZE, Domid

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T], limit_s: float = 30) -> T:
    """Run a test's coroutine; a hang becomes a failure that shows where."""

    async def limited() -> T:
        async with asyncio.timeout(limit_s):
            return await work

    return asyncio.run(limited())


async def until(condition: Callable[[], bool], limit_s: float = 10) -> None:
    """Let everybody else run until it holds."""
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


def opener(*layers: str) -> StorageOpener:
    """Opens what the toolstack names, as the daemon does, with layers in front."""

    async def open_storage(assignment: BackendAssignment) -> Engine:
        return await asyncio.to_thread(
            open_engine,
            storage_uri(assignment),
            read_only=not assignment.writable,
            layers=layers,
            user=f"{assignment.frontend_domid}/{assignment.name}",
        )

    return open_storage


class World:
    """What a test of whole disks holds; everything of one guest is made on demand."""

    def __init__(
        self, host: EmulatedHost, dom0: EmulatedMachine, store: XenstoreClient, guest_page: int
    ) -> None:
        self.host = host
        self.guest_page = guest_page
        self.dom0 = dom0
        self.store = store
        self.server: Server | None = None
        self.guests: dict[Domid, tuple[EmulatedMachine, XenstoreClient]] = {}
        self.undo: list[Callable[[], Awaitable[None]]] = []
        self.journals = tempfile.TemporaryDirectory(prefix="xvd-journals-")

    async def serve(
        self,
        open_storage: StorageOpener,
        settings: Settings | None = None,
        budget: Budget | None = None,
        pulse: asyncio.Event | None = None,
    ) -> Server:
        """A backend in domain 0; its journals are there for the next one."""
        settings = replace(settings or Settings(), state_dir=Path(self.journals.name))
        self.server = Server(
            self.dom0, self.store, open_storage, settings=settings, budget=budget, pulse=pulse
        )
        await self.server.start()
        return self.server

    async def guest(self, domid: int = 1) -> tuple[EmulatedMachine, XenstoreClient]:
        """A guest's machine and its connection to the store."""
        number = Domid(domid)
        if number not in self.guests:
            self.host.create_domain(number)
            await create_guest(self.store, number, f"guest{domid}")
            machine = self.host.machine(number, self.guest_page)
            self.guests[number] = machine, await machine.xenstore()
        return self.guests[number]

    async def attach(
        self,
        target: str = "memory:8M",
        *,
        domid: int = 1,
        vdev: str = "xvda",
        access: str = "rw",
        timeout_s: float = 10,
    ) -> Vbd:
        await self.guest(domid)
        disk = parse_xl_disk(f"vdev={vdev},access={access},target={target}")
        return await attach(self.store, Domid(domid), disk, timeout_s=timeout_s)

    async def open(self, vbd: Vbd, front: FrontSettings | None = None) -> Disk:
        machine, store = await self.guest(vbd.domid)
        return await Disk.open(machine, store, f"device/vbd/{vbd.vdev}", settings=front)

    async def disk(
        self, target: str = "memory:8M", *, front: FrontSettings | None = None, **options: Any
    ) -> Disk:
        """Attach a disk and open it."""
        return await self.open(await self.attach(target, **options), front)

    async def close(self) -> None:
        if self.server is not None:
            await self.server.close()
        for machine, store in self.guests.values():
            await store.close()
            machine.close()
        await self.store.close()
        self.dom0.close()
        self.journals.cleanup()


@asynccontextmanager
async def disk_world(
    *layers: str,
    open_storage: StorageOpener | None = None,
    settings: Settings | None = None,
    budget: Budget | None = None,
    limits: Limits = SMALL,
    serve: bool = True,
    dom0_page: int = PAGE_SIZE,
    guest_page: int = PAGE_SIZE,
) -> AsyncIterator[World]:
    """A host with a backend in domain 0; `layers` go in front of every disk's storage. The kernels
    of the two domains have pages of such sizes."""
    async with HOST_SERVICE(limits) as host:
        dom0 = host.machine(Domid(0), dom0_page)
        world = World(host, dom0, await dom0.xenstore(), guest_page)
        if serve:
            await world.serve(open_storage or opener(*layers), settings, budget)
        try:
            yield world
        finally:
            await world.close()
        assert host.host.accounting() == NOTHING
