# SPDX-License-Identifier: Apache-2.0
"""A whole emulated machine in this process: host, store, and the sockets that lead to both."""

import asyncio
import mmap
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from xvd.machine.emulated.host import Host
from xvd.machine.emulated.limits import Limits
from xvd.machine.emulated.link import LinkClient, LinkServer
from xvd.machine.emulated.machine import EmulatedMachine
from xvd.machine.emulated.paths import MACHINE_SOCKET, XENSTORE_SOCKET
from xvd.machine.emulated.xenstore import XenstoreStore
from xvd.machine.xs.client import XenstoreClient
from xvd.machine.xs.server import XenstoreServer
from xvd.types import Domid


class EmulatedHost:
    """An emulated Xen host with domain 0; everything in the event loop's thread."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.host = Host(limits)
        self.host.create_domain(Domid(0))
        self.store = XenstoreStore()
        self.server = XenstoreServer(self.store)
        self._link: LinkServer | None = None
        self._machines: list[EmulatedMachine] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def listen(self, directory: str | os.PathLike[str]) -> None:
        """Serve other processes: the store at DIR/socket, the machine at DIR/machine.

        Raises `ConfigError` if a host is running there.
        """
        where = Path(directory)
        self._link = LinkServer(self.host, self.server.connect_local)
        self._link.listen(where / MACHINE_SOCKET)
        await self.server.listen(where / XENSTORE_SOCKET)

    def machine(self, domid: Domid, page_size: int = mmap.PAGESIZE) -> EmulatedMachine:
        """Connect this process to one of the domains, whose kernel has pages of `page_size`."""

        async def connect() -> XenstoreClient:
            return await XenstoreClient.from_socket(self.server.connect_local(domid))

        machine = EmulatedMachine(self.host.open(domid), connect, page_size)
        self._machines.append(machine)
        return machine

    def create_domain(self, domid: Domid) -> None:
        """Make a domain (`toolstack.create_guest` gives it its place in the store)."""
        self.host.create_domain(domid)

    def destroy_domain(self, domid: Domid) -> None:
        """End a domain."""
        self.host.destroy_domain(domid)

    async def close(self) -> None:
        """Cut everybody off and forget everything."""
        if self._link is not None:
            self._link.close()
        for machine in self._machines:
            machine.close()
        await self.server.close()
        self.host.close()


def connect(directory: str | os.PathLike[str], domid: Domid) -> EmulatedMachine:
    """Connect to a domain of the host that runs in `directory`.

    Raises `PeerClosed` if none does, `GrantError` if it has no such domain.
    """
    link = LinkClient(Path(directory) / MACHINE_SOCKET, domid)

    async def open_store() -> XenstoreClient:
        # The host may be one of this very event loop, which has to answer.
        return await XenstoreClient.from_socket(await asyncio.to_thread(link.xenstore))

    return EmulatedMachine(link, open_store)
