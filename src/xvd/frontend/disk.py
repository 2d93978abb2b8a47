# SPDX-License-Identifier: Apache-2.0
"""A disk as a Python object: how it is opened and closed, and what its device and its clients have
to do with it. operations.py has what is asked of it.
"""

import asyncio
import errno
from types import TracebackType
from typing import Self

from xvd.blkif.abi import Abi
from xvd.blkif.features import BackendFeatures
from xvd.dataplane.types import HasPorts
from xvd.errors import XvdError, describe
from xvd.frontend.connection import Connection
from xvd.frontend.device import Device
from xvd.frontend.ending import wait_for_end
from xvd.frontend.operations import Operations
from xvd.frontend.settings import Settings
from xvd.frontend.statistics import FrontCounters, Statistics
from xvd.machine.interface import Machine
from xvd.machine.xs.client import XenstoreClient
from xvd.xenbus.runner import THREADS, Runtime


class Disk(Operations):
    """One disk of this domain, from the frontend's side: see `Operations`. `gone` is set when it
    has gone for good. `connections` counts them, the first included.
    """

    def __init__(
        self,
        machine: Machine,
        store: XenstoreClient,
        path: str,
        *,
        abi: Abi | None = None,
        settings: Settings | None = None,
        runtime: Runtime = THREADS,
    ) -> None:
        super().__init__()
        self._device = Device(
            machine,
            store,
            path,
            self,
            abi=abi,
            settings=settings,
            runtime=runtime,
        )
        self._connection: Connection | None = None
        self._past = Statistics()
        self._ended: OSError | None = None
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ready.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._running: asyncio.Task[None] | None = None
        self.gone = asyncio.Event()
        self.connections = 0

    @classmethod
    async def open(
        cls,
        machine: Machine,
        store: XenstoreClient,
        path: str,
        *,
        abi: Abi | None = None,
        settings: Settings | None = None,
        runtime: Runtime = THREADS,
    ) -> Self:
        """Connect to the disk in `path` (``device/vbd/51712``, relative to this domain).

        Waits for the backend as long as there is one to wait for; raises OSError (ENODEV) or an
        `XvdError` that says why there is none.
        """
        disk = cls(machine, store, path, abi=abi, settings=settings, runtime=runtime)
        disk._running = asyncio.create_task(disk._device.run())
        try:
            await disk._ready
        except BaseException:
            await disk._leave(abandon=True)
            raise
        return disk

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self, timeout_s: float | None = None) -> None:
        """Finish what is outstanding, give the disk back to the next driver. Idempotent.

        A backend that takes longer than `timeout_s` seconds is left as by a process that dies:
        what it has not answered fails, and the next driver begins with a reset. None: waits.
        """
        await self._leave(abandon=False, timeout_s=timeout_s)

    def resume(self) -> None:
        """Go on after a suspension of this domain, or on another host.

        Everything in flight goes to the backend that is there now. Not for a suspension that was
        cancelled: its rings are as they were.
        """
        self._device.resume()

    async def _leave(self, *, abandon: bool, timeout_s: float | None = None) -> None:
        if self._running is None:
            return
        if abandon or self._ended is not None:
            self._device.abandon()  # a backend that broke the protocol is not waited for
        else:
            self._device.close()
        running, self._running = self._running, None
        await wait_for_end(running, self._device.abandon, timeout_s)

    @property
    def device(self) -> Device:
        """The handshake's side of this disk."""
        return self._device

    def statistics(self) -> Statistics:
        """The figures of every queue, over all connections."""
        if self._connection is None:
            return self._past
        return self._past.plus(self._connection.statistics())

    def counters(self) -> FrontCounters:
        """The counters added up over queues and connections."""
        return self.statistics().total()

    # ---- The device's side ----

    def connected(self, connection: Connection, features: BackendFeatures) -> None:
        """A connection is up: everything outstanding goes on it."""
        self._connection, self._features = connection, features
        self._withdrawn.clear()
        self.connections += 1
        self._pending.connected(connection, features)
        self._allow()
        self._clients.connected(connection)
        if not self._ready.done():
            self._ready.set_result(None)

    def resized(self, features: BackendFeatures) -> None:
        """Another capacity, on the same connection."""
        self._features = features
        self._allow()

    def disconnected(self) -> None:
        """Note that the connection has ended; answers that came are taken, the rest waits."""
        self._pending.disconnected()
        self._clients.disconnected()
        assert self._connection is not None
        self._past = self._past.plus(self._connection.statistics().closed())
        self._connection = None

    def ended(self, error: OSError | XvdError) -> None:
        """Fail whatever waits: there will be no connection again."""
        self._ended = OSError(errno.ENODEV, f"the disk is gone: {describe(error)}")
        self.gone.set()
        if not self._ready.done():
            self._ready.set_exception(error)
        self._pending.ended(self._ended)
        self._clients.ended()

    # ---- Clients ----

    def attach(self, client: HasPorts) -> None:
        """Have a compiled client stepped in the thread of a queue (dataplane/front/clients.pyx).

        What its queue refuses it asks of this object's methods. It survives connections, as any
        operation does.
        """
        self._clients.attach(client)

    def wake(self, client: HasPorts) -> None:
        """Have a client stepped now: somebody has told it something."""
        self._clients.wake(client)

    def detach(self, client: HasPorts) -> None:
        """Release a client that has left."""
        self._clients.detach(client)
