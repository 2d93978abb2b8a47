# SPDX-License-Identifier: Apache-2.0
"""A xenstore on sockets: the standard unix socket for dom0, and one socket for each guest.

The idea to read it by: a connection is read only while its replies can be written. A client that
sends and does not receive is not read any more; one that sends much is served a few requests at a
time, so others are served between; and watch events, which nobody can hold back, wait in a queue
without duplicates whose size is bounded: over the bound the connection is cut. So whatever a client
does, it costs that client's connection, a bounded amount of memory and nothing else.
"""

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from xvd.errors import XenstoreError
from xvd.loglimit import LogLimit
from xvd.machine.xs.messages import Framer, Message, MessageType
from xvd.sockets import UnixListener, claim
from xvd.types import Domid

_LOG = logging.getLogger(__name__)

_BURST: Final = 16
"""Requests of one connection that are answered before those of others."""

_WRITE_BUFFER: Final = 64 * 1024
"""Bytes in the transport after which a connection's requests wait."""

BACKLOG_MAX: Final = 1024 * 1024
"""Bytes of watch events that may wait for a client that does not read."""


class StoreConnection(Protocol):
    """One client as the store sees it."""

    def handle(self, message: Message) -> None:
        """Answer one request through `send`, at once."""

    def close(self) -> None:
        """The client went; may be called more than once."""


class Store(Protocol):
    """A store to be served: `xvd.machine.emulated.xenstore.XenstoreStore` is one."""

    def connect(
        self, domid: Domid, send: Callable[[Message], None], drop: Callable[[], None]
    ) -> StoreConnection:
        """A new client of a domain; `send` and `drop` are called from the event loop's thread."""


class _Peer(asyncio.Protocol):
    """One client: bytes in, requests to the store; replies and events, bytes out."""

    def __init__(self, server: "XenstoreServer", domid: Domid) -> None:
        self._server = server
        self._domid = domid
        self._framer = Framer()
        self._waiting: deque[bytes] = deque()
        self._waiting_events: set[bytes] = set()
        self._waiting_bytes = 0
        self._writable = True
        self._pumping = False
        self._closed = False
        self._transport: asyncio.Transport | None = None
        self._connection: StoreConnection | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=_WRITE_BUFFER)
        self._server.peers.add(self)
        try:
            self._connection = self._server.store.connect(self._domid, self._send, self.abort)
        except XenstoreError as error:
            self.abort(str(error))

    def data_received(self, data: bytes) -> None:
        self._framer.feed(data)
        if not self._pumping:
            self._pump()

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        while self._waiting and self._writable and self._transport is not None:
            packed = self._waiting.popleft()
            self._waiting_bytes -= len(packed)
            self._waiting_events.discard(packed)
            self._transport.write(packed)
        if self._writable and not self._pumping:
            self._pump()

    def connection_lost(self, _exc: Exception | None) -> None:
        self._closed = True
        self._server.peers.discard(self)
        if self._connection is not None:
            self._connection.close()
        self._server.peer_left.set()

    def abort(self, reason: str = "") -> None:
        """Go at once: what a client has not read it will not get, or it could hold us up."""
        if reason and not self._closed:
            text = "xenstore: cutting a connection of domain %d: %s"
            self._server.log_limit(self._domid).log(
                _LOG, logging.WARNING, text, self._domid, reason
            )
        self._closed = True
        if self._transport is not None:
            self._transport.abort()

    def _pump(self) -> None:
        # Answers up to a burst of what has arrived. Reading stops while any is left over, or else
        # a client that sends without receiving would fill the framer.
        self._pumping = False
        assert self._transport is not None
        for _ in range(_BURST):
            if self._closed:
                return
            if not self._writable:
                self._transport.pause_reading()
                return
            try:
                message = self._framer.next_message()
            except XenstoreError as error:
                self.abort(str(error))
                return
            if message is None:
                self._transport.resume_reading()
                return
            self._handle(message)
        self._transport.pause_reading()
        self._pumping = True
        asyncio.get_running_loop().call_soon(self._pump)

    def _handle(self, message: Message) -> None:
        assert self._connection is not None
        try:
            self._connection.handle(message)
        except Exception:
            # A bug in the store, found by this client: it alone pays.
            if self._server.log_limit(self._domid).admit(_LOG, logging.ERROR, "request failed"):
                _LOG.exception("xenstore: request of type %d failed", message.type)
            self.abort("its request could not be answered")

    def _send(self, message: Message) -> None:
        if self._closed or self._transport is None:
            return
        packed = message.pack()
        if self._writable and not self._waiting:
            self._transport.write(packed)
            return
        if message.type == MessageType.WATCH_EVENT:
            # What waits already will make the client read again (XSA-349). Special events are
            # counted by some clients, so these are all sent, as C xenstored does.
            if packed in self._waiting_events:
                return
            if not message.payload.startswith(b"@"):
                self._waiting_events.add(packed)
        self._waiting.append(packed)
        self._waiting_bytes += len(packed)
        if self._waiting_bytes > self._server.backlog_max:
            self.abort(f"more than {self._server.backlog_max} bytes of events wait for it")


class XenstoreServer:
    """Serves one store; everything in the event loop's thread.

    `backlog_max` is how many bytes of watch events may wait for one client before it is cut.
    """

    def __init__(self, store: Store, *, backlog_max: int = BACKLOG_MAX) -> None:
        self.store = store
        self.backlog_max = backlog_max
        self.peers: set[_Peer] = set()
        self.peer_left = asyncio.Event()
        self._listeners: list[tuple[asyncio.Server, UnixListener]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._log_limits: dict[Domid, LogLimit] = {}

    def log_limit(self, domid: Domid) -> LogLimit:
        """How much a domain may cause to be logged, by all its connections, one after another."""
        return self._log_limits.setdefault(domid, LogLimit(domid))

    async def listen(self, path: str | os.PathLike[str]) -> None:
        """Accept dom0's connections on a unix socket at `path`, mode 0660.

        A socket that nobody answers is replaced, and the new one is there with its mode at once.
        Raises `ConfigError` if a live server answers there, or if `path` is not a socket.
        """
        claimed = claim(path)
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(lambda: _Peer(self, Domid(0)), sock=claimed.socket)
        self._listeners.append((server, claimed))

    async def serve_socket(self, sock: socket.socket, domid: Domid) -> None:
        """Serve a connected stream socket as `domid`'s; the server closes it when it ends.

        Returns when the connection is set up. Whoever holds the other end is that domain.
        """
        loop = asyncio.get_running_loop()
        sock.setblocking(False)
        await loop.connect_accepted_socket(lambda: _Peer(self, domid), sock)

    def connect_local(self, domid: Domid) -> socket.socket:
        """Return one end of a socket pair, the caller's, whose other end is served as `domid`'s.

        To be called in the event loop's thread; requests may be written at once.
        """
        ours, theirs = socket.socketpair()
        task = asyncio.get_running_loop().create_task(self.serve_socket(ours, domid))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return theirs

    async def close(self) -> None:
        """Stop listening, end every connection, remove the socket if it is still ours."""
        await asyncio.gather(*self._tasks)
        for server, claimed in self._listeners:
            server.close()
            claimed.remove()
        self._listeners.clear()
        for peer in list(self.peers):
            peer.abort()
        while self.peers:
            self.peer_left.clear()
            await self.peer_left.wait()
