# SPDX-License-Identifier: Apache-2.0
"""One NBD client: bytes in, operations on the disk, replies out.

The stream is a row of units, each a header of known length and perhaps a payload; `_pump` takes as
many as have arrived. Each request becomes a task, so that any number are on the disk at once.

A client cannot make us hold more than `REQUESTS_MAX` requests and `BYTES_MAX` bytes: beyond that
we do not read from it, and the same while it does not read its replies.

A request that is on the disk is finished even if its client has gone: to cancel a write half way
would leave the others with neither its outcome nor its absence.
"""

import asyncio
import errno
import logging
import mmap
import socket
from collections import Counter
from collections.abc import Callable
from typing import Final, Protocol

from xvd.export import nbd_protocol as nbd
from xvd.export.nbd_negotiation import (
    BASE_ALLOCATION_ID,
    OPTION_LENGTH_MAX,
    Export,
    Negotiation,
    Outcome,
)
from xvd.export.nbd_protocol import Chunk, Command, CommandFlag, Malformed, Request

logger = logging.getLogger(__name__)

REQUESTS_MAX: Final = 256
"""Requests of one client in progress; nbdcopy sends 64 at a time, fio as many as it is told."""
BYTES_MAX: Final = 2 * nbd.PAYLOAD_MAX
"""Bytes of data of one client's requests in progress."""

_BUFFER: Final = 64 * 1024
_JOIN_MAX: Final = 16 * 1024
"""Data up to this size is copied next to its header, to be sent with others in one call."""
_LAZY: Final = 4 << 20
"""Payloads from this size on get memory as they arrive, not when they are announced."""
_WRITE_HIGH, _WRITE_LOW = 4 << 20, 1 << 20
"""Bytes of replies that wait before requests do, and how few until they go on."""
_ZEROES: Final = memoryview(bytes(1 << 20))
"""Longest piece of a WRITE_ZEROES: other requests get their turn between two."""

_WRITING: Final = (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)


class ExportedDisk(Protocol):
    """What an export uses of a disk: `xvd.frontend.disk.Disk` is one. Errors are OSErrors."""

    @property
    def size(self) -> int:
        """Bytes; may change."""

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
        """Let go of a range."""


class Owner(Protocol):
    """The server, as its connections see it."""

    disk: ExportedDisk
    count: Counter[str]
    patience_s: float

    def export(self) -> Export:
        """What a client is told that arrives now."""

    def arrived(self, connection: "NbdConnection") -> bool:
        """Whether there is room for it."""

    def left(self, connection: "NbdConnection") -> None:
        """Its socket is closed and nothing of it is in progress."""


class NbdConnection(asyncio.BufferedProtocol):
    """One client. Everything in the event loop's thread."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._disk = owner.disk
        self._negotiation = Negotiation(owner.export)
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        # A unit: its header's length, what to do with the header, and its payload on the way.
        self._header_length = 4
        self._on_header: Callable[[], bool] = self._client_flags
        self._payload: memoryview | None = None
        self._payload_at = 0
        self._on_payload: Callable[[memoryview], None] = self._no_payload
        self._skip = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._bytes = 0
        self._replies: list[bytes | bytearray] = []
        self._unsent = 0
        self._writable = True
        self._blocked = False
        self._ending = False
        self._gone = False
        self._lost = False

    @property
    def in_flight(self) -> int:
        """Requests in progress."""
        return len(self._tasks)

    @property
    def held_bytes(self) -> int:
        """Data of requests in progress, and replies that the client has not read."""
        unread = 0 if self._transport is None else self._transport.get_write_buffer_size()
        return self._bytes + self._unsent + unread

    # ---- The transport's side ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client: greet it, or turn it away."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        _keep_alive(transport)
        transport.set_write_buffer_limits(high=_WRITE_HIGH, low=_WRITE_LOW)
        if not self._owner.arrived(self):
            transport.abort()
            return
        self._arm()
        transport.write(nbd.greeting())

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go: a payload's straight to its place."""
        if self._payload is not None and self._start == self._end:
            return self._payload[self._payload_at :]
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == _BUFFER:
            rest = bytes(self._view[self._start :])
            self._start, self._end = 0, len(rest)
            self._buffer[: self._end] = rest
        return self._view[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes have come."""
        if self._payload is not None and self._start == self._end:
            self._payload_at += nbytes
        else:
            self._end += nbytes
        self._pump()

    def eof_received(self) -> bool:
        """The client sends no more, and did not say so before: it has probably gone."""
        self._gone = True
        self.finish()
        return True  # if it only sends no more, the replies are still its due

    def pause_writing(self) -> None:
        """The client does not read: begin nothing more for it."""
        self._writable = False

    def resume_writing(self) -> None:
        """The client has read."""
        self._writable = True
        self._pump()

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is closed."""
        self._gone = self._lost = self._ending = True
        self._disarm()
        self._payload = None
        self._replies.clear()
        self._leave_if_done()

    def _arm(self) -> None:
        """Cut the client off if it keeps us waiting, in negotiation or in the end."""
        self._timer = self._loop.call_later(self._owner.patience_s, self.abort)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ---- Ending ----

    def finish(self) -> None:
        """Take no more; close when what is in progress is answered and the answers are read."""
        if self._ending:
            return
        self._ending = True
        assert self._transport is not None
        self._transport.pause_reading()
        self._disarm()
        self._leave_if_done()

    def abort(self) -> None:
        """Close at once; what is on the disk finishes unheard."""
        self._ending = True
        if self._transport is not None:
            self._transport.abort()

    def cancel(self) -> None:
        """Close at once and cancel what is on the disk: only when all clients are ended."""
        self.abort()
        for task in self._tasks:
            task.cancel()

    def _leave_if_done(self) -> None:
        if self._tasks:
            return
        if self._lost:
            self._owner.left(self)
        elif self._ending:
            assert self._transport is not None
            self._send()
            self._transport.close()
            if self._timer is None:
                self._arm()

    def _refuse(self, reason: Malformed) -> None:
        """The stream makes no sense any more: there is nobody to answer."""
        self._owner.count["malformed"] += 1
        logger.debug("nbd: closing a connection: %s", reason)
        self.abort()

    # ---- Units ----

    def _pump(self) -> None:
        """Take every unit that is there and may be begun."""
        assert self._transport is not None
        try:
            while not self._ending and self._step():
                pass
        except Malformed as error:
            self._refuse(error)
        if self._ending:
            return
        header_is_there = self._end - self._start >= self._header_length
        blocked = header_is_there and self._payload is None and not self._skip
        if blocked and not self._blocked:
            self._transport.pause_reading()
        elif self._blocked and not blocked:
            self._transport.resume_reading()
        self._blocked = blocked

    def _step(self) -> bool:
        """Take one header, payload or piece of what is skipped; False if there is none to take."""
        if self._skip:
            return self._skip_some()
        if self._payload is not None:
            return self._fill_payload()
        if self._end - self._start < self._header_length or not self._may_begin(0):
            return False
        return self._on_header()

    def _skip_some(self) -> bool:
        taken = min(self._skip, self._end - self._start)
        self._start += taken
        self._skip -= taken
        return taken > 0

    def _fill_payload(self) -> bool:
        payload = self._payload
        assert payload is not None
        taken = min(len(payload) - self._payload_at, self._end - self._start)
        if taken:
            start = self._start
            payload[self._payload_at : self._payload_at + taken] = self._view[start : start + taken]
            self._start += taken
            self._payload_at += taken
        if self._payload_at < len(payload):
            return False
        self._payload = None
        self._on_payload(payload)
        return True

    def _no_payload(self, payload: memoryview) -> None:
        raise AssertionError("no payload is expected")

    def _take_header(self) -> bytes:
        self._start += self._header_length
        return bytes(self._view[self._start - self._header_length : self._start])

    def _expect_payload(self, length: int, then: Callable[[memoryview], None]) -> None:
        self._payload = memoryview(bytearray(length) if length < _LAZY else _pages(length))
        self._payload_at = 0
        self._on_payload = then

    # ---- Negotiation ----

    def _client_flags(self) -> bool:
        self._negotiation.client_flags = nbd.parse_client_flags(self._take_header())
        self._header_length, self._on_header = nbd.OPTION_HEADER.size, self._option
        return True

    def _option(self) -> bool:
        option, length = nbd.parse_option_header(self._take_header())
        if length > OPTION_LENGTH_MAX:
            text = f"an option of {length} bytes; {OPTION_LENGTH_MAX} are allowed"
            self._write(nbd.option_error(option, nbd.OptionReply.ERR_TOO_BIG, text))
            self.finish()
            return False
        self._expect_payload(length, lambda data: self._take_option(option, bytes(data)))
        return True

    def _take_option(self, option: int, data: bytes) -> None:
        replies, outcome = self._negotiation.take(option, data)
        if replies:
            self._write(replies)
        if outcome is Outcome.END:
            self.finish()
        elif outcome is Outcome.TRANSMISSION:
            self._disarm()
            self._owner.count["handshakes"] += 1
            self._header_length, self._on_header = nbd.REQUEST.size, self._request

    # ---- Requests ----

    def _may_begin(self, length: int) -> bool:
        """Whether the client has room for a request of `length` bytes of data."""
        held = self._bytes + self._unsent + length
        return self._writable and len(self._tasks) < REQUESTS_MAX and held <= BYTES_MAX

    def _request(self) -> bool:
        request = nbd.parse_request(self._buffer, self._start)
        command = request.command
        cost = request.length if command in (Command.READ, Command.WRITE) else 0
        error = self._refusal(request)
        if error is None and not self._may_begin(cost):
            return False
        self._start += nbd.REQUEST.size
        if command == Command.DISC:
            self.finish()
            return False
        self._owner.count["requests"] += 1
        if error is not None:
            return self._reject(request, error)
        self._bytes += cost
        if command == Command.WRITE and request.length:
            self._expect_payload(request.length, lambda data: self._begin(request, data))
        else:
            self._begin(request, None)
        return True

    def _refusal(self, request: Request) -> OSError | None:
        """Why a request cannot be carried out, before anything is done for it."""
        flags, command, _, offset, length = request
        if command == Command.DISC:
            return None
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
            return OSError(errno.EINVAL, "this disk does not offer discard")
        if command == Command.BLOCK_STATUS and (not self._negotiation.allocation or not length):
            return OSError(errno.EINVAL, "no metadata context was negotiated, or no length given")
        return None

    def _reject(self, request: Request, error: OSError) -> bool:
        """Answer with an error and pass over a payload; an absurd one ends the connection."""
        self._owner.count["rejected"] += 1
        if request.command == Command.WRITE:
            if request.length > nbd.PAYLOAD_MAX:
                raise Malformed(f"a write of {request.length} bytes")
            self._skip = request.length
        self._write(self._error_reply(request, error))
        return True

    def _begin(self, request: Request, payload: memoryview | None) -> None:
        self._tasks.add(self._loop.create_task(self._serve(request, payload)))

    async def _serve(self, request: Request, payload: memoryview | None) -> None:
        """Carry out one request and answer it. Nothing escapes: one reply, whatever happens."""
        try:
            if request.command == Command.READ:
                self._reply_data(request, await self._disk.read(request.offset, request.length))
            else:
                await self._run(request, payload)
                self._write(self._success_reply(request))
        except OSError as error:
            self._fail(request, error)
        except MemoryError:
            self._fail(request, OSError(errno.ENOMEM, "no memory for this request"))
        except Exception:
            logger.exception("nbd: command %d failed", request.command)
            self._fail(request, OSError(errno.EIO, "the server failed; its log says how"))
        finally:
            task = asyncio.current_task()
            assert task is not None
            self._tasks.discard(task)
            if request.command in (Command.READ, Command.WRITE):
                self._bytes -= request.length
            self._over()

    def _over(self) -> None:
        """A request is done: there may be room for another, or all may be done."""
        if self._ending:
            self._leave_if_done()
        elif self._blocked:
            self._pump()

    async def _run(self, request: Request, payload: memoryview | None) -> None:
        flags, command, _, offset, length = request
        if command == Command.WRITE:
            if payload is not None:
                await self._disk.write(offset, payload)
                self._owner.count["bytes_written"] += length
        elif command == Command.TRIM:
            await self._disk.discard(offset, length)
        elif command == Command.WRITE_ZEROES:
            await self._write_zeroes(flags, offset, length)
        if command == Command.FLUSH or (flags & CommandFlag.FUA and command in _WRITING):
            await self._disk.flush()

    async def _write_zeroes(self, flags: int, offset: int, length: int) -> None:
        """Zeros are written: what a discard leaves behind is undefined on a Xen disk."""
        if flags & CommandFlag.FAST_ZERO:
            raise OSError(errno.EOPNOTSUPP, "zeroing is no faster than writing here")
        while length:
            if self._gone:  # nobody waits for the rest, which may be 4 GiB
                raise OSError(errno.ESHUTDOWN, "given up: the client has disconnected")
            piece = min(length, len(_ZEROES))
            await self._disk.write(offset, _ZEROES[:piece])
            offset, length = offset + piece, length - piece

    # ---- Replies ----

    def _fail(self, request: Request, error: OSError) -> None:
        self._owner.count["failed"] += 1
        self._write(self._error_reply(request, error))

    def _error_reply(self, request: Request, error: OSError) -> bytes:
        number = nbd.error_number(error)
        if self._negotiation.structured:
            return nbd.error_chunk(request.cookie, number, nbd.error_text(error))
        return nbd.simple_reply(request.cookie, number)

    def _success_reply(self, request: Request) -> bytes:
        if request.command == Command.BLOCK_STATUS:
            # blkif has no way to ask where data lies: all of it is data, which is always true.
            extents = [nbd.Extent(request.length, 0)]
            return nbd.block_status_chunk(request.cookie, BASE_ALLOCATION_ID, extents)
        return nbd.simple_reply(request.cookie)

    def _reply_data(self, request: Request, data: bytearray) -> None:
        cookie, length = request.cookie, len(data)
        self._owner.count["bytes_read"] += length
        if not self._negotiation.structured:
            header = nbd.simple_reply(cookie)
        elif length:
            header = nbd.data_chunk_header(cookie, request.offset, length)
        else:
            header = nbd.chunk(cookie, Chunk.NONE)
        self._write(header, data)

    def _write(self, *parts: bytes | bytearray) -> None:
        """Queue a reply; what is queued in one turn of the loop leaves in one call."""
        if self._lost:
            return
        if not self._replies:
            self._loop.call_soon(self._send)
        self._replies.extend(parts)
        self._unsent += len(parts[-1])

    def _send(self) -> None:
        if not self._replies or self._lost:
            return
        assert self._transport is not None
        small: list[bytes | bytearray] = []
        for part in self._replies:
            small.append(part)
            if len(part) > _JOIN_MAX:
                large = small.pop()
                self._transport.write(b"".join(small))
                self._transport.write(large)
                small.clear()
        self._replies.clear()
        self._unsent = 0
        if small:
            self._transport.write(b"".join(small))
        if self._blocked:
            self._pump()


def _pages(length: int) -> mmap.mmap:
    return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _keep_alive(transport: asyncio.Transport) -> None:
    """A TCP client whose host has vanished is found out, in the system's time."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
