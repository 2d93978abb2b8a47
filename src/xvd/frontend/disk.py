# SPDX-License-Identifier: Apache-2.0
"""A disk as a Python object: read, write, flush and discard, of any size and alignment.

The operations persist over connections (pending.py): a caller sees a delay and no error. Reads and
writes are whole: an operation of any length is one future, split on the ring.

A write that does not begin or end on a block waits for writes in progress on its blocks, and new
ones wait for it (edges.py).

What a backend does not do, although it said so, it says once: the feature is off from then on, and
the operation is done in the next best way (blkif.h leaves that to the frontend).
"""

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

from xvd.blkif.abi import MAX_SEGMENTS_PER_REQUEST, Abi, DiscardFlag, Op
from xvd.blkif.features import BackendFeatures
from xvd.dataplane.types import HasPorts
from xvd.errors import XvdError, describe
from xvd.frontend.clients import DiskClients
from xvd.frontend.connection import Connection
from xvd.frontend.device import Device
from xvd.frontend.edges import Edges
from xvd.frontend.ending import wait_for_end
from xvd.frontend.info import DiskInfo
from xvd.frontend.pending import BlocksChanged, Pending
from xvd.frontend.settings import Settings
from xvd.frontend.statistics import FrontCounters, Statistics
from xvd.machine.interface import Machine
from xvd.machine.xs.client import XenstoreClient
from xvd.types import PAGE_SIZE, RING_SECTOR_SIZE
from xvd.xenbus.runner import THREADS, Runtime

logger = logging.getLogger(__name__)

BARRIER_BYTES_MAX = MAX_SEGMENTS_PER_REQUEST * PAGE_SIZE
"""What one direct request carries."""


class Disk(DiskInfo):
    """One disk of this domain, from the frontend's side. All calls in the event loop's thread.

    Offsets and lengths are bytes. Errors are OSErrors with an errno: EINVAL for what is not on the
    disk, EROFS for writing to a read-only one, EIO and EOPNOTSUPP as the backend says, ENODEV when
    the disk has gone for good; `gone` is set then. `connections` counts them, the first included.
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
        self._clients = DiskClients()
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
        self._pending = Pending()
        self._past = Statistics()
        self._edges = Edges(self._pending, self._clients)
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

    def _allow(self) -> None:
        """Set what clients may ask a queue for, as of now."""
        flushes = self._works(Op.FLUSH_DISKCACHE)
        self._clients.allow(self._known(), writable=not self.read_only, flushes=flushes)

    # ---- Operations ----

    async def read(self, offset: int, length: int) -> bytearray:
        """`length` bytes from `offset` on."""
        self._check(offset, length)
        if length == 0:
            return bytearray()
        while True:
            first, sectors = self.blocks_of(offset, length)
            buffer = bytearray(sectors * RING_SECTOR_SIZE)
            try:
                await self._pending.run(Op.READ, first, sectors, buffer)
            except BlocksChanged:
                continue
            skip = offset - first * RING_SECTOR_SIZE
            return buffer if len(buffer) == length else buffer[skip : skip + length]

    async def write(
        self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False
    ) -> None:
        """Store `data` at `offset`; durable after a later `flush`, or with `fua` when it returns.

        Where a flush does nothing (`can_flush`), nor does `fua`.
        """
        data = memoryview(data).cast("B")
        self._check(offset, len(data))
        self._check_writable()
        if len(data) == 0:
            return
        if fua and await self._write_barrier(offset, data):
            return
        await self._write(offset, data)
        if fua:
            await self.flush()

    async def _write(self, offset: int, data: memoryview) -> None:
        while True:
            first, sectors = self.blocks_of(offset, len(data))
            try:
                if sectors * RING_SECTOR_SIZE != len(data):
                    await self._edges.write(self, offset, data)
                else:
                    await self._edges.wait(first, first + sectors)
                    await self._pending.run(Op.WRITE, first, sectors, data)
            except BlocksChanged:
                continue
            return

    async def _write_barrier(self, offset: int, data: memoryview) -> bool:
        """Write and make durable in one request; False if that cannot be had."""
        first, sectors = self.blocks_of(offset, len(data))
        whole = sectors * RING_SECTOR_SIZE == len(data)
        if not whole or not self._works(Op.WRITE_BARRIER) or len(data) > BARRIER_BYTES_MAX:
            return False
        await self._edges.wait(first, first + sectors)
        try:
            await self._pending.run(Op.WRITE_BARRIER, first, sectors, data)
        except BlocksChanged:
            return False
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            self._withdraw(Op.WRITE_BARRIER, "barriers: writes are flushed instead")
            return False
        return True

    async def change(self, offset: int, length: int, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work`, which changes whole blocks in another way than by the ring, as if it were a
        write: no other write touches them meanwhile. Raises what a write and `work` do."""
        self._check(offset, length)
        self._check_writable()
        first, sectors = self.blocks_of(offset, length)
        await self._edges.hold(first, first + sectors, work)

    async def flush(self) -> None:
        """Make durable every write that has returned.

        By a flush, or by an empty barrier where the backend has nothing else. One that has neither,
        or says so only now, leaves nothing to be done; `can_flush` tells.
        """
        if self._works(Op.FLUSH_DISKCACHE):
            try:
                return await self._pending.run(Op.FLUSH_DISKCACHE)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
            self._withdraw(Op.FLUSH_DISKCACHE, "flush: how durable writes are is up to it")
        if self._works(Op.WRITE_BARRIER):
            try:
                return await self._pending.run(Op.WRITE_BARRIER)
            except OSError as error:
                # FreeBSD's backend fails a barrier without data instead of not offering it.
                if error.errno not in (errno.EOPNOTSUPP, errno.EIO):
                    raise
            self._withdraw(Op.WRITE_BARRIER, "barriers: how durable writes are is up to it")

    def _withdraw(self, operation: Op, what: str) -> None:
        """The backend does not do what it has offered, or its successor does not any more."""
        if operation not in self._withdrawn:
            self._withdrawn.add(operation)
            self._allow()
            logger.warning("the backend has withdrawn %s", what)

    async def discard(self, offset: int, length: int, *, secure: bool = False) -> None:
        """Discard the whole units within a range: what is read there afterwards is undefined.

        secure: the old data cannot be got back by any means; the range must be whole blocks then,
        and all of it is discarded. Raises OSError: EOPNOTSUPP if the backend does not offer it,
        EINVAL for a secure range that is no whole number of blocks.
        """
        self._check(offset, length)
        self._check_writable()
        if not (self.can_discard_securely if secure else self.can_discard):
            what = "secure discard" if secure else "discard"
            raise OSError(errno.EOPNOTSUPP, f"the backend does not offer {what}")
        unit, first = (self.logical_block_size, 0) if secure else self._discard_unit()
        start = -(-(offset - first) // unit) * unit + first
        end = (offset + length - first) // unit * unit + first
        if secure and (start, end) != (offset, offset + length):
            raise OSError(errno.EINVAL, f"a secure discard is of whole blocks of {unit} bytes")
        if start >= end:
            return
        sectors = start // RING_SECTOR_SIZE, (end - start) // RING_SECTOR_SIZE
        flag = DiscardFlag.SECURE if secure else 0
        try:
            await self._pending.run(Op.DISCARD, *sectors, flag=flag)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                self._withdraw(Op.DISCARD, "discard")
            raise
