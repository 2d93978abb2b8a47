# SPDX-License-Identifier: Apache-2.0
"""What a disk is, by what its backend publishes and has withdrawn; and what is asked of it: read,
write, flush and discard, of any size and alignment.

The operations persist over connections (pending.py): a caller sees a delay and no error. Reads and
writes are whole: an operation of any length is one future, split on the ring.

A write that does not begin or end on a block waits for writes in progress on its blocks, and new
ones wait for it (edges.py).

What a backend does not do, although it said so, it says once: the feature is off from then on, and
the operation is done in the next best way (blkif.h leaves that to the frontend).
"""

import errno
import logging
from collections.abc import Awaitable, Callable

from xvd.blkif.abi import MAX_SEGMENTS_PER_REQUEST, DiscardFlag, InfoFlag, Op
from xvd.blkif.features import BackendFeatures, offered_operations
from xvd.frontend.clients import DiskClients
from xvd.frontend.edges import Edges
from xvd.frontend.pending import BlocksChanged, Pending
from xvd.types import PAGE_SIZE, RING_SECTOR_SIZE

logger = logging.getLogger(__name__)

BARRIER_BYTES_MAX = MAX_SEGMENTS_PER_REQUEST * PAGE_SIZE
"""What one direct request carries."""


class Operations:
    """A disk to whoever uses it, in the event loop's thread. Offsets and lengths are bytes.

    Errors are OSErrors with an errno: EINVAL for what is not on the disk, EROFS for writing to a
    read-only one, EIO and EOPNOTSUPP as the backend says, ENODEV when the disk has gone for good,
    and before it is connected.
    """

    def __init__(self) -> None:
        self._clients = DiskClients()
        self._pending = Pending()
        self._edges = Edges(self._pending, self._clients)
        self._features: BackendFeatures | None = None
        self._withdrawn: set[Op] = set()

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
        return self._works(Op.FLUSH_DISKCACHE) or self._works(Op.WRITE_BARRIER)

    @property
    def can_discard(self) -> bool:
        """Whether discard is offered."""
        return self._works(Op.DISCARD)

    @property
    def can_discard_securely(self) -> bool:
        """Whether the data is then beyond recovery, if asked."""
        return self.can_discard and self._known().discard_secure

    @property
    def discard_granularity(self) -> int:
        """Bytes: what is not a whole unit of these is not discarded; 0 without discard."""
        return self._discard_unit()[0] if self.can_discard else 0

    @property
    def discard_alignment(self) -> int:
        """Bytes from the beginning of the disk to the first unit."""
        return self._discard_unit()[1] if self.can_discard else 0

    def _discard_unit(self) -> tuple[int, int]:
        """(granularity, alignment); what is not in whole blocks makes no sense and is left out."""
        known, block = self._known(), self.logical_block_size
        unit = known.discard_granularity
        if unit == 0 or unit % block:
            unit = block
        return unit, known.discard_alignment % unit // block * block

    def _works(self, operation: Op) -> bool:
        """Whether the backend offers it, and has not said otherwise since."""
        offered = bool(offered_operations(self._known()) & 1 << operation)
        return offered and operation not in self._withdrawn

    @property
    def features(self) -> BackendFeatures:
        """The features that the backend publishes."""
        return self._known()

    # ---- Ranges ----

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OSError(
                errno.EINVAL, f"{length} bytes at {offset} are not on a disk of {self.size} bytes"
            )

    def _check_writable(self) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, "the disk is read-only")

    def blocks_of(self, offset: int, length: int) -> tuple[int, int]:
        """Return the blocks that a range of bytes touches, as (first sector, sectors)."""
        block = self.logical_block_size
        start = offset // block * block
        end = -(-(offset + length) // block) * block
        return start // RING_SECTOR_SIZE, (end - start) // RING_SECTOR_SIZE

    # ---- Clients ----

    def _allow(self) -> None:
        """Set what clients may ask a queue for, as of now."""
        flushes = self._works(Op.FLUSH_DISKCACHE)
        self._clients.allow(self._known(), writable=not self.read_only, flushes=flushes)

    # ---- What is asked ----

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
                    if self._edges.changes:
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
