# SPDX-License-Identifier: Apache-2.0
"""What of a client's requests is not done in a queue's thread: everything but plain reads, writes
and flushes, and the words for whatever fails.

Each becomes a task on the disk, whose methods take any offset and length; its reply goes back to
the compiled transmission, which sends it between two others. A request that is on the disk is
finished even if its client has gone: to cancel a write half way would leave the others with neither
its outcome nor its absence.
"""

import asyncio
import errno
import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final, Protocol

from xvd.export import nbd_protocol as nbd
from xvd.export.nbd_negotiation import BASE_ALLOCATION_ID, Negotiation
from xvd.export.nbd_protocol import Chunk, Command, CommandFlag, Request, TransmissionFlag
from xvd.export.transmission import Transmission

logger = logging.getLogger(__name__)

_ZEROES: Final = memoryview(bytes(1 << 20))
"""Longest piece of a WRITE_ZEROES: other requests are served between two."""
EXTENTS_MAX: Final = 4096
"""Parts that one block status tells of: what an image in many pieces has in some gigabytes."""
_WRITING: Final = (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)


class ExportedDisk(Protocol):
    """What an export uses of a disk: `xvd.frontend.disk.Disk` is one. Errors are OSErrors."""

    @property
    def size(self) -> int:
        """Bytes; may change."""

    @property
    def logical_block_size(self) -> int:
        """Bytes."""

    @property
    def physical_block_size(self) -> int:
        """Bytes."""

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""

    @property
    def can_flush(self) -> bool:
        """Whether a flush does anything."""

    @property
    def can_discard(self) -> bool:
        """Whether discard works."""

    async def read(self, offset: int, length: int) -> bytearray:
        """Any bytes on the disk."""

    async def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Any bytes on the disk; `data` is not changed before this returns."""

    async def flush(self) -> None:
        """Make durable what was written before."""

    async def discard(self, offset: int, length: int) -> None:
        """Release a range."""

    async def change(self, offset: int, length: int, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work` on whole blocks as if it were a write: no other write there meanwhile."""

    def attach(self, client: Transmission) -> None:
        """Have a client stepped by the thread of a queue, until it has left."""

    def wake(self, client: Transmission) -> None:
        """Have it stepped now."""

    def detach(self, client: Transmission) -> None:
        """Release a client that has left."""


class StorageExtent(Protocol):
    """A part of the storage."""

    @property
    def length(self) -> int:
        """Bytes."""

    @property
    def hole(self) -> bool:
        """Whether nothing is kept for them, and they read as zeros."""


class Storage(Protocol):
    """A disk's storage where it is at hand, in the same process: what blkif has no words for.

    Whole blocks; from any thread; errors are OSErrors. An engine is one.
    """

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Zeros that are not written, and with `unmap` take no space; EOPNOTSUPP: to be written."""

    def extents(self, offset: int, length: int, most: int) -> Sequence[StorageExtent]:
        """Tell where a range has data, as its first parts."""


class Requests:
    """The long way of one client's requests. Everything in the event loop's thread.

    storage: the disk's, where it is at hand. on_news: is called with the flags (OVER and the
    others) of a `Transmission`, each once.
    """

    def __init__(
        self,
        transmission: Transmission,
        disk: ExportedDisk,
        negotiated: Negotiation,
        count: Counter[str],
        on_news: Callable[[int], None],
        *,
        storage: Storage | None = None,
    ) -> None:
        self._transmission = transmission
        self._storage = storage
        self._disk = disk
        self._negotiated = negotiated
        self._count = count
        self._on_news = on_news
        self._tasks: set[asyncio.Task[None]] = set()
        self._gone = False
        asyncio.get_running_loop().add_reader(transmission.bell, self._rung)
        disk.attach(transmission)

    def cancel(self) -> None:
        """Cancel what is on the disk: only when all clients are ended."""
        for task in self._tasks:
            task.cancel()

    def _rung(self) -> None:
        os.eventfd_read(self._transmission.bell)
        news, requests = self._transmission.take()
        for slot, error, flags, command, cookie, offset, length, payload in requests:
            request = Request(flags, command, cookie, offset, length)
            if error:
                words = f"{Command(command).name} of {length} bytes at {offset}"
                self._fail(slot, request, OSError(error, f"{words}: {os.strerror(error)}"))
            elif (refusal := self._refusal(request)) is not None:
                self._count["rejected"] += 1
                self._answer(slot, self._error_reply(request, refusal))
            else:
                self._begin(slot, request, payload)
        if news & (Transmission.EOF | Transmission.GONE):
            self._gone = True
        if news & Transmission.LEFT:
            asyncio.get_running_loop().remove_reader(self._transmission.bell)
            self._disk.detach(self._transmission)
            self._transmission.close()
        if news:
            self._on_news(news)

    def _answer(self, slot: int, *parts: bytes | bytearray) -> None:
        if self._transmission.answer(slot, *parts):
            self._disk.wake(self._transmission)

    # ---- Requests ----

    def _refusal(self, request: Request) -> OSError | None:
        """Why a request cannot be carried out, before anything is done for it."""
        flags, command, _, offset, length = request
        known = nbd.FLAGS_OF.get(command)
        if known is None:
            return OSError(errno.EINVAL, f"unknown command {command}")
        if flags & ~known:
            return OSError(errno.EINVAL, f"unknown flags {flags:#x} for command {command}")
        writing = command in _WRITING
        if writing and self._disk.read_only:
            return OSError(errno.EROFS, "the disk is read-only")
        if command in (Command.READ, Command.WRITE) and length > nbd.PAYLOAD_MAX:
            return OSError(errno.EOVERFLOW, f"{length} bytes; {nbd.PAYLOAD_MAX} are allowed")
        if command != Command.FLUSH and offset + length > self._disk.size:
            number = errno.ENOSPC if writing and command != Command.TRIM else errno.EINVAL
            return OSError(number, f"beyond the end of a disk of {self._disk.size} bytes")
        if command == Command.TRIM and not self._disk.can_discard:
            # To one that was offered it the storage has said no since: as it said to the first.
            chosen = self._negotiated.chosen
            offered = chosen is not None and chosen.flags & TransmissionFlag.SEND_TRIM
            number = errno.EOPNOTSUPP if offered else errno.EINVAL
            return OSError(number, "this disk does not offer discard")
        if command == Command.BLOCK_STATUS and (not self._negotiated.allocation or not length):
            return OSError(errno.EINVAL, "no metadata context was negotiated, or no length given")
        return None

    def _begin(self, slot: int, request: Request, payload: bytes | None) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(slot, request, payload))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, slot: int, request: Request, payload: bytes | None) -> None:
        """Carry out one request and answer it. Nothing escapes: one reply, whatever happens."""
        try:
            if request.command == Command.READ:
                self._reply_data(
                    slot, request, await self._disk.read(request.offset, request.length)
                )
            elif request.command == Command.BLOCK_STATUS:
                self._answer(slot, await self._block_status(request))
            else:
                await self._run(request, payload)
                self._answer(slot, self._success_reply(request))
        except OSError as error:
            self._fail(slot, request, error)
        except MemoryError:
            self._fail(slot, request, OSError(errno.ENOMEM, "no memory for this request"))
        except asyncio.CancelledError:
            closing = OSError(errno.ESHUTDOWN, "the server is closing")
            self._answer(slot, self._error_reply(request, closing))
            raise
        except Exception:
            logger.exception("nbd: command %d failed", request.command)
            self._fail(slot, request, OSError(errno.EIO, "the server failed; its log says how"))

    async def _run(self, request: Request, payload: bytes | None) -> None:
        flags, command, _, offset, length = request
        if command == Command.WRITE:
            if payload is not None:
                await self._disk.write(offset, payload)
                self._count["bytes_written"] += length
        elif command == Command.TRIM:
            await self._disk.discard(offset, length)
        elif command == Command.WRITE_ZEROES:
            await self._write_zeroes(flags, offset, length)
        if command == Command.FLUSH or (flags & CommandFlag.FUA and command in _WRITING):
            await self._disk.flush()

    async def _write_zeroes(self, flags: int, offset: int, length: int) -> None:
        """By the storage where it is at hand and can; otherwise zeros are written: what a discard
        leaves behind is undefined on a Xen disk."""
        block, end = self._disk.logical_block_size, offset + length
        first, last = -(-offset // block) * block, end // block * block
        if first < last and await self._zero(first, last - first, not flags & CommandFlag.NO_HOLE):
            await self._write_zeroes_out(offset, first)
            await self._write_zeroes_out(last, end)
        elif flags & CommandFlag.FAST_ZERO:
            raise OSError(errno.EOPNOTSUPP, "zeroing is no faster than writing here")
        else:
            await self._write_zeroes_out(offset, end)

    async def _zero(self, offset: int, length: int, unmap: bool) -> bool:
        """Let the storage do it; False if it cannot."""
        if self._storage is None:
            return False
        zero = partial(self._storage.write_zeroes, offset, length, unmap=unmap)
        try:
            await self._disk.change(offset, length, partial(asyncio.to_thread, zero))
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return False
        return True

    async def _write_zeroes_out(self, offset: int, end: int) -> None:
        while offset < end:
            if self._gone:  # nobody waits for the rest, which may be 4 GiB
                raise OSError(errno.ESHUTDOWN, "given up: the client has disconnected")
            piece = min(end - offset, len(_ZEROES))
            await self._disk.write(offset, _ZEROES[:piece])
            offset += piece

    async def _block_status(self, request: Request) -> bytes:
        """Tell where a range has data. blkif has no way to ask: only storage at hand can tell."""
        most = 1 if request.flags & CommandFlag.REQ_ONE else EXTENTS_MAX
        block, end = self._disk.logical_block_size, request.offset + request.length
        at, last = request.offset // block * block, -(-end // block) * block
        assert self._storage is not None
        try:
            parts = await asyncio.to_thread(self._storage.extents, at, last - at, most)
        except OSError:
            parts = []  # cut short behind our back, perhaps: a read there says what is wrong
        extents = []
        for part in parts:
            size = min(at + part.length, end) - max(at, request.offset)
            extents.append(nbd.Extent(size, nbd.HOLE if part.hole else nbd.DATA))
            at += part.length
        extents = extents or [nbd.Extent(request.length, nbd.DATA)]
        return nbd.block_status_chunk(request.cookie, BASE_ALLOCATION_ID, extents)

    # ---- Replies ----

    def _fail(self, slot: int, request: Request, error: OSError) -> None:
        self._count["failed"] += 1
        self._answer(slot, self._error_reply(request, error))

    def _error_reply(self, request: Request, error: OSError) -> bytes:
        number = nbd.error_number(error)
        if self._negotiated.structured:
            return nbd.error_chunk(request.cookie, number, nbd.error_text(error))
        return nbd.simple_reply(request.cookie, number)

    def _success_reply(self, request: Request) -> bytes:
        return nbd.simple_reply(request.cookie)

    def _reply_data(self, slot: int, request: Request, data: bytearray) -> None:
        cookie, length = request.cookie, len(data)
        self._count["bytes_read"] += length
        if not self._negotiated.structured:
            header = nbd.simple_reply(cookie)
        elif length:
            header = nbd.data_chunk_header(cookie, request.offset, length)
        else:
            header = nbd.chunk(cookie, Chunk.NONE)
        self._answer(slot, header, data)
