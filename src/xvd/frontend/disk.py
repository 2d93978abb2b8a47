# SPDX-License-Identifier: Apache-2.0
"""A disk as a Python object: read, write, flush and discard, of any size and alignment.

The operations outlive a connection: what is outstanding when the backend goes away is submitted
again to the next one, as a guest's driver does, so a caller sees a delay and no error. Reads and
writes are whole: an operation of any length is one future, split on the ring.

A write that does not begin or end on a block is a read, a change and a write of the blocks at its
edges; it waits for writes in progress on its blocks, and new ones wait for it.
"""

import asyncio
import contextlib
import errno
import logging
import os
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from xvd.blkif.abi import Abi, InfoFlag, Op
from xvd.blkif.nodes import BackendFeatures
from xvd.dataplane.front import FrontQueue
from xvd.errors import XvdError
from xvd.frontend.connection import Connection
from xvd.frontend.device import Device
from xvd.frontend.settings import Settings
from xvd.machine.interface import Machine
from xvd.machine.xs.client import XenstoreClient
from xvd.types import RING_SECTOR_SIZE

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Outstanding:
    operation: Op
    sector_number: int
    nr_sectors: int
    buffer: bytes | bytearray | memoryview | None
    done: asyncio.Future[int]

    def blocks_write(self, first: int, end: int) -> bool:
        """Whether this is a write that touches the sectors from `first` to before `end`."""
        touches = self.sector_number < end and first < self.sector_number + self.nr_sectors
        return self.operation is Op.WRITE and touches


class Disk:
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
    ) -> None:
        self._device = Device(machine, store, path, self, abi=abi, settings=settings)
        self._connection: Connection | None = None
        self._features: BackendFeatures | None = None
        self._outstanding: dict[int, _Outstanding] = {}
        self._next_token = 0
        self._edges: list[tuple[int, int, asyncio.Task[None]]] = []
        self._flush_works = True
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
    ) -> Self:
        """Connect to the disk in `path` (``device/vbd/51712``, relative to this domain).

        Waits for the backend as long as there is one to wait for; raises OSError (ENODEV) or an
        `XvdError` that says why there is none.
        """
        disk = cls(machine, store, path, abi=abi, settings=settings)
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

    async def close(self) -> None:
        """Finish what is outstanding, give the disk back to the next driver. Idempotent."""
        await self._leave(abandon=False)

    async def _leave(self, *, abandon: bool) -> None:
        if self._running is None:
            return
        if abandon or self._ended is not None:
            self._device.abandon()  # a backend that broke the protocol is not waited for
        else:
            self._device.close()
        running, self._running = self._running, None
        await asyncio.gather(running, return_exceptions=True)

    # ---- What the disk is ----

    def _known(self) -> BackendFeatures:
        if self._features is None:
            raise OSError(errno.ENODEV, "the disk is not connected yet")
        return self._features

    @property
    def size(self) -> int:
        """Capacity in bytes."""
        return self._known().sectors * RING_SECTOR_SIZE

    @property
    def logical_block_size(self) -> int:
        """Smallest unit that the backend takes, bytes; this object takes any."""
        return self._known().sector_size

    @property
    def physical_block_size(self) -> int:
        """Smallest unit that the storage writes without reading first, bytes."""
        return self._known().physical_sector_size

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        return bool(self._known().info & InfoFlag.READONLY)

    @property
    def can_flush(self) -> bool:
        """Whether a flush reaches the medium; without it a flush succeeds and does nothing."""
        return self._known().flush and self._flush_works

    @property
    def can_discard(self) -> bool:
        """Whether discard is offered."""
        return self._known().discard

    @property
    def discard_granularity(self) -> int:
        """Bytes; smaller discards may do nothing."""
        return self._known().discard_granularity

    @property
    def features(self) -> BackendFeatures:
        """All that the backend publishes."""
        return self._known()

    @property
    def device(self) -> Device:
        """The handshake's side of this disk."""
        return self._device

    def counters(self) -> dict[str, int]:
        """The figures of the connection that is up; empty when none is."""
        return {} if self._connection is None else self._connection.counters()

    # ---- The device's side ----

    def connected(self, connection: Connection, features: BackendFeatures) -> None:
        """A connection is up: everything outstanding goes on it."""
        self._connection = connection
        self._features = features
        self._flush_works = True
        self.connections += 1
        for queue in connection.queues:
            asyncio.get_running_loop().add_reader(queue.done_fd, self._reap, queue)
        for token, io in self._outstanding.items():
            self._put(token, io)
        if not self._ready.done():
            self._ready.set_result(None)

    def resized(self, features: BackendFeatures) -> None:
        """Another capacity, on the same connection."""
        self._features = features

    def disconnected(self) -> None:
        """The queues are over; answers that came are taken, the rest waits."""
        assert self._connection is not None
        for queue in self._connection.queues:
            self._reap(queue)
            asyncio.get_running_loop().remove_reader(queue.done_fd)
        self._connection = None

    def ended(self, error: OSError | XvdError) -> None:
        """There will be no connection again: whatever waits has failed."""
        self._ended = OSError(errno.ENODEV, f"the disk is gone: {error}")
        self.gone.set()
        if not self._ready.done():
            self._ready.set_exception(error)
        for io in self._outstanding.values():
            if not io.done.done():
                io.done.set_exception(self._ended)
        self._outstanding.clear()

    def _reap(self, queue: FrontQueue) -> None:
        with contextlib.suppress(BlockingIOError):  # `disconnected` looks without being rung for
            os.eventfd_read(queue.done_fd)
        for token, error in queue.reap():
            io = self._outstanding.pop(token)
            if not io.done.done():
                io.done.set_result(error)

    # ---- Operations ----

    def _put(self, token: int, io: _Outstanding) -> None:
        assert self._connection is not None
        self._connection.submit(io.operation, io.sector_number, io.nr_sectors, io.buffer, token)

    async def _run(
        self,
        operation: Op,
        first: int,
        sectors: int,
        buffer: bytes | bytearray | memoryview | None = None,
    ) -> None:
        """Submit whole sectors and wait; OSError for what the backend refused."""
        if self._ended is not None:
            raise self._ended
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        io = _Outstanding(operation, first, sectors, buffer, done)
        token, self._next_token = self._next_token, self._next_token + 1
        self._outstanding[token] = io
        if self._connection is not None:
            self._put(token, io)
        error = await done
        if error:
            where = f"{operation.name} of {sectors} sectors at {first}"
            raise OSError(error, f"{where}: {os.strerror(error)}")

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OSError(
                errno.EINVAL, f"{length} bytes at {offset} are not on a disk of {self.size} bytes"
            )

    def _check_writable(self) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, "the disk is read-only")

    def _whole(self, offset: int, length: int) -> tuple[int, int]:
        """The blocks that a range touches, as (first sector, sectors)."""
        block = self.logical_block_size
        start = offset // block * block
        end = -(-(offset + length) // block) * block
        return start // RING_SECTOR_SIZE, (end - start) // RING_SECTOR_SIZE

    async def read(self, offset: int, length: int) -> bytearray:
        """`length` bytes from `offset` on."""
        self._check(offset, length)
        if length == 0:
            return bytearray()
        first, sectors = self._whole(offset, length)
        buffer = bytearray(sectors * RING_SECTOR_SIZE)
        await self._run(Op.READ, first, sectors, buffer)
        if len(buffer) == length:
            return buffer
        skip = offset - first * RING_SECTOR_SIZE
        return buffer[skip : skip + length]

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Store `data` at `offset`; durable after a later `flush`."""
        data = memoryview(data).cast("B")
        length = len(data)
        self._check(offset, length)
        self._check_writable()
        if length == 0:
            return
        first, sectors = self._whole(offset, length)
        if sectors * RING_SECTOR_SIZE != length:
            await self._write_edges(offset, data, first, sectors)
            return
        await self._wait_for_edges(first, first + sectors)
        await self._run(Op.WRITE, first, sectors, data)

    async def _wait_for_edges(self, first: int, end: int) -> None:
        """Wait for every unaligned write in progress that touches these sectors."""

        def touches(a: int, b: int) -> bool:
            return a < end and first < b

        while waiting := [w for a, b, w in self._edges if touches(a, b) and not w.done()]:
            await asyncio.wait(waiting)

    async def _write_edges(
        self, offset: int, data: bytes | bytearray | memoryview, first: int, sectors: int
    ) -> None:
        end = first + sectors
        await self._wait_for_edges(first, end)
        change = asyncio.create_task(self._change(offset, data, first, sectors))
        entry = (first, end, change)
        self._edges.append(entry)
        change.add_done_callback(lambda _: self._edges.remove(entry))
        # A caller that gives up does not end it: what is on the ring would still be written, and
        # over the next writer's data in these blocks.
        await asyncio.shield(change)

    async def _change(
        self, offset: int, data: bytes | bytearray | memoryview, first: int, sectors: int
    ) -> None:
        """Read whole blocks, change a part, write them; new writes on them wait meanwhile."""
        for io in self._writes_on(first, first + sectors):
            await asyncio.wait([io.done])
        buffer = bytearray(sectors * RING_SECTOR_SIZE)
        await self._run(Op.READ, first, sectors, buffer)
        skip = offset - first * RING_SECTOR_SIZE
        buffer[skip : skip + len(data)] = data
        await self._run(Op.WRITE, first, sectors, buffer)

    def _writes_on(self, first: int, end: int) -> list[_Outstanding]:
        return [io for io in self._outstanding.values() if io.blocks_write(first, end)]

    async def flush(self) -> None:
        """Make durable every write that has returned.

        A backend that cannot flush, or says so only now, leaves nothing to be done (blkif: the
        frontend's duty to fall back); `can_flush` tells.
        """
        if not self.can_flush:
            return
        try:
            await self._run(Op.FLUSH_DISKCACHE, 0, 0)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            self._flush_works = False
            logger.warning("the backend has withdrawn flush: how durable writes are is up to it")

    async def discard(self, offset: int, length: int) -> None:
        """Let go of the whole blocks within a range: what is read there afterwards is undefined.

        Raises OSError (EOPNOTSUPP) if the backend does not offer it.
        """
        self._check(offset, length)
        self._check_writable()
        if not self.can_discard:
            raise OSError(errno.EOPNOTSUPP, "the backend does not offer discard")
        block = self.logical_block_size
        start = -(-offset // block) * block
        end = (offset + length) // block * block
        if start >= end:
            return
        await self._run(
            Op.DISCARD, start // RING_SECTOR_SIZE, (end - start) // RING_SECTOR_SIZE
        )  # fmt: skip
