# SPDX-License-Identifier: Apache-2.0
"""For tests of a PV driver: a backend that is driven by hand, and that may lie.

`raw_backend` makes a host with one guest, whose disk waits for its driver. The driver may be any
program that joins the host's directory (docs/own-driver.md), or `xvd.Disk`.
"""

import asyncio
import contextlib
import math
import os
from collections.abc import AsyncIterator, Mapping
from typing import Final

from xvd.blkif.abi import Abi, Status, XenbusState
from xvd.blkif.features import BackendFeatures, format_backend
from xvd.blkif.messages import AnyRequest, Request, Response, unpack_request
from xvd.blkif.nodes import parse_frontend
from xvd.blkif.ring import BackRing, Outcome
from xvd.blkif.validate import answer as answered
from xvd.errors import ConfigError, PeerProtocolError
from xvd.machine.emulated.service import EmulatedHost
from xvd.machine.interface import Machine
from xvd.machine.xs.client import XenstoreClient
from xvd.toolstack.vbd import Vbd, add, create_guest, wait_for_state
from xvd.toolstack.xldisk import XlDisk
from xvd.types import DOM0, RING_SECTOR_SIZE, Domid
from xvd.xenbus.directory import read_directory

__all__ = ["RawBackend", "raw_backend"]

HONEST: Final[Mapping[str, str]] = format_backend(BackendFeatures(sectors=2048)).write
"""What `RawBackend.connect` publishes: a disk of 1 MiB that can flush."""
CONNECT_S: Final = 10.0
"""For the frontend to publish its ring."""
_PUBLISHED: Final = (XenbusState.INITIALISED, XenbusState.CONNECTED)
_LOOK_S: Final = 0.01
"""Between two looks at the ring without an event: Python has no fence for it (blkif/ring.py)."""


class RawBackend:
    """One disk's backend without manners; everything in the event loop's thread.

    It has one queue of one page, direct requests only, and no storage: the test writes its nodes,
    takes what the frontend asks and answers as it likes. `ring`, `mapping` (the ring's page),
    `grants` (the frontend's) and `port` are there from `connect` on, for worse.
    """

    def __init__(self, machine: Machine, store: XenstoreClient, vbd: Vbd) -> None:
        self.machine = machine
        self.store = store
        self.vbd = vbd
        self.abi = Abi.native()
        self._undo = contextlib.ExitStack()

    async def write(self, nodes: Mapping[str, str | bytes | None]) -> None:
        """Write nodes of the backend's directory, in their order; None removes one."""
        for name, value in nodes.items():
            path = f"{self.vbd.backend}/{name}"
            if value is None:
                await self.store.rm(path)
            else:
                await self.store.write(path, value)

    async def connect(self, nodes: Mapping[str, str | bytes | None] | None = None) -> None:
        """Offer, wait for the frontend's ring, map it, and publish `nodes` over `HONEST` ones.

        Raises TimeoutError if the frontend publishes none in `CONNECT_S`, and `PeerProtocolError`
        for one that makes no sense.
        """
        await self.write({"state": str(int(XenbusState.INIT_WAIT))})
        await wait_for_state(self.store, self.vbd.frontend, lambda s: s in _PUBLISHED, CONNECT_S)
        published = await read_directory(self.store, self.vbd.frontend, lambda _: True)
        config = parse_frontend(
            published, host_abi=Abi.native(), max_queues=1, max_ring_page_order=0
        )
        [queue] = config.queues
        self.abi = config.abi
        self.grants = self.machine.grants.foreign(self.vbd.domid)
        self._undo.callback(self.grants.close)
        self.mapping = self.grants.map(queue.ring_refs)
        self._undo.callback(self.mapping.close)
        channels = self.machine.event_channels
        self.port = channels.bind_interdomain(self.vbd.domid, queue.event_channel)
        self._undo.callback(self.port.close)
        self.ring = BackRing(self.mapping.view, self.abi).attach()
        await self.write({**HONEST, **(nodes or {}), "state": str(int(XenbusState.CONNECTED))})

    async def take(self) -> bytes:
        """Wait for the frontend's next request; return its slot as it lay on the ring.

        Raises `PeerProtocolError` where the frontend's index is further than the ring is long.
        """
        while True:
            outcome, slot = self.ring.take()
            if outcome is Outcome.REQUEST:
                return slot
            if outcome is Outcome.BROKEN:
                raise PeerProtocolError(f"{self.vbd.name}: req_prod is beyond the ring")
            if not self.ring.final_check():
                await self._event()

    async def request(self) -> AnyRequest:
        """Wait for the frontend's next request, as `take`, and return it unpacked."""
        return unpack_request(self.abi, await self.take())

    async def _event(self) -> None:
        loop, came, fd = asyncio.get_running_loop(), asyncio.Event(), self.port.fileno()
        loop.add_reader(fd, came.set)
        try:
            async with asyncio.timeout(_LOOK_S):
                await came.wait()
        except TimeoutError:
            return
        finally:
            loop.remove_reader(fd)
        self.port.consume()

    def received(self, request: AnyRequest) -> bytes:
        """Return the data of a write, read from the pages that the frontend granted.

        Raises `GrantError` for a page that is not granted, and `ConfigError` for a request that
        has no segments of its own.
        """
        return b"".join(
            self.grants.read(
                it.gref, it.first_sect * RING_SECTOR_SIZE, it.sectors * RING_SECTOR_SIZE
            )
            for it in _direct(request).segments
        )

    def fill(self, request: AnyRequest, data: bytes) -> None:
        """Put the data of a read into the pages that the frontend granted; raises as `received`."""
        for it in _direct(request).segments:
            size = it.sectors * RING_SECTOR_SIZE
            self.grants.write(it.gref, it.first_sect * RING_SECTOR_SIZE, data[:size])
            data = data[size:]

    def answer(self, request: AnyRequest, status: int = Status.OKAY) -> None:
        """Answer a request with its own id and operation."""
        self.respond(Response(request.id, answered(request, Status.OKAY).operation, status))

    def respond(self, *responses: Response) -> None:
        """Publish responses, whatever they say, and send an event.

        Raises `LocalProtocolError` for more of them than requests were taken.
        """
        for response in responses:
            self.ring.put_response(response)
        self.push()

    def push(self) -> None:
        """Publish the responses that were put into `ring`, and send an event."""
        self.ring.push()
        self.port.notify()

    async def until_closed(self) -> None:
        """Wait until the frontend closes its end, at its pace; `close` and state 6 are due then."""
        closing, closed = XenbusState.CLOSING, (XenbusState.UNKNOWN, XenbusState.CLOSED)
        ends = (closing, *closed)
        await wait_for_state(self.store, self.vbd.frontend, lambda s: s in ends, math.inf)
        await self.write({"state": str(int(closing))})
        await wait_for_state(self.store, self.vbd.frontend, lambda s: s in closed, math.inf)

    def close(self) -> None:
        """Give everything back, whatever is in flight; the nodes stay as they are. Idempotent."""
        self._undo.close()


def _direct(request: AnyRequest) -> Request:
    if not isinstance(request, Request):
        raise ConfigError(f"{request} has no segments of its own; this backend offers only those")
    return request


@contextlib.asynccontextmanager
async def raw_backend(
    directory: str | os.PathLike[str], *, domid: int = 1, vdev: str = "xvda"
) -> AsyncIterator[RawBackend]:
    """An emulated host that other processes join at `directory`, as one of ``xvd host``.

    It has one guest with one disk, whose backend, in domain 0, is driven by hand; the block has it.
    At the end everybody is cut off, and the host is gone. Raises `ConfigError` if a host is running
    in the directory, or for a vdev that is none.
    """
    guest = Domid(domid)
    async with EmulatedHost() as host, contextlib.AsyncExitStack() as stack:
        await host.listen(directory)
        host.create_domain(guest)
        machine = host.machine(DOM0)
        store = await machine.xenstore()
        stack.push_async_callback(store.close)
        await create_guest(store, guest, "guest")
        vbd = await add(store, guest, XlDisk(target="by-hand", vdev=vdev), DOM0)
        backend = RawBackend(machine, store, vbd)
        stack.callback(backend.close)
        yield backend
