# SPDX-License-Identifier: Apache-2.0
"""Disks as NBD exports, so that ordinary tools (qemu-img, fio, nbdcopy, nbdfuse) can use them.

A disk behind any number of connections: what one client was told is written, every other one
reads, and the flush of one makes it durable for all (NBD's CAN_MULTI_CONN).
"""

import asyncio
import contextlib
import ipaddress
import logging
import os
import socket
import ssl
from collections import Counter
from types import TracebackType
from typing import Final, NamedTuple, Self
from urllib.parse import quote

from xvd.errors import ConfigError, describe
from xvd.export.memory import ExportMemory
from xvd.export.nbd_connection import NbdConnection
from xvd.export.nbd_negotiation import Export
from xvd.export.nbd_protocol import STRING_MAX, TransmissionFlag
from xvd.export.nbd_requests import ExportedDisk, Storage
from xvd.export.tls import relay
from xvd.sockets import UnixListener, claim
from xvd.types import RING_SECTOR_SIZE

logger = logging.getLogger(__name__)

__all__ = ["ExportedDisk", "NbdServer"]

CONNECTIONS_MAX: Final = 64
"""Clients at a time; with their limits it bounds what all of them together can make us hold."""
CLOSE_TIMEOUT_S: Final = 5.0
PATIENCE_S: Final = 10.0
"""For a client to choose an export, and to read the last replies after it has disconnected: one
that does neither keeps its place no longer. And for one to send or read a byte while others wait
for memory that it holds."""
MEMORY_MAX: Final = 256 << 20
"""Bytes of buffers of all clients together: four of them may have all that one may."""
_PREFERRED_MAX = 4096
_RETRY_S: Final = 1.0
"""Until another client is accepted when there was no descriptor for the last one."""


class _Exported(NamedTuple):
    """A disk, and what clients are told of it."""

    disk: ExportedDisk
    name: str
    description: str
    storage: Storage | None
    tells_holes: bool


class NbdServer:
    """Serves `disk` under `name`, which the empty name means too. All calls in the event loop.

    storage: the disk's, where it is at hand. tells_holes: whether it knows where it has data.
    `add` serves further disks.

    Raises `ConfigError` for a name or description that NBD cannot carry.
    """

    def __init__(
        self,
        disk: ExportedDisk,
        *,
        name: str = "",
        description: str = "",
        storage: Storage | None = None,
        tells_holes: bool = False,
        connections_max: int = CONNECTIONS_MAX,
        patience_s: float = PATIENCE_S,
        memory_max: int = MEMORY_MAX,
    ) -> None:
        self._exported: dict[str, _Exported] = {}
        self.add(disk, name=name, description=description, storage=storage, tells_holes=tells_holes)
        self.name = name
        self.count: Counter[str] = Counter()
        self.patience_s = patience_s
        self.memory = ExportMemory(memory_max)
        self._connections_max = connections_max
        self._relief: asyncio.TimerHandle | None = None
        asyncio.get_running_loop().add_reader(self.memory.bell, self._memory_is_short)
        self._connections: set[NbdConnection] = set()
        self._listeners: dict[socket.socket, ssl.SSLContext | None] = {}
        self._relays: set[asyncio.Task[None]] = set()
        self._claimed: list[UnixListener] = []
        self._places: list[tuple[str, str]] = []
        self._ports: list[int] = []
        self._closed = False
        self._nobody = asyncio.Event()
        self._nobody.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def add(
        self,
        disk: ExportedDisk,
        *,
        name: str,
        description: str = "",
        storage: Storage | None = None,
        tells_holes: bool = False,
    ) -> None:
        """Serve another disk under a name of its own; raises as the constructor, and `ConfigError`
        for a name that another one has."""
        for text in (name, description):
            if len(text.encode()) > STRING_MAX or "\0" in text:
                raise ConfigError(f"{text[:40]!r}...: NBD has room for {STRING_MAX} bytes, no NUL")
        if name in self._exported:
            raise ConfigError(f"two exports have the name {name!r}; name them: --export-name")
        holes = storage is not None and tells_holes
        self._exported[name] = _Exported(disk, name, description, storage, holes)

    # ---- Listening ----

    async def listen_unix(self, path: str | os.PathLike[str], mode: int = 0o660) -> str:
        """Accept clients on a unix socket; the first export's URI.

        A socket that nobody answers is replaced. Raises `ConfigError` if a live server answers
        there, if `path` is not a socket, or if none can be made there.
        """
        claimed = claim(path, mode=mode)
        self._claimed.append(claimed)
        self._listen(claimed.socket)
        # NBD's URI document (doc/uri.md): nbd+unix:///NAME?socket=PATH
        return self._listens("nbd+unix:///", f"?socket={quote(str(claimed.path))}", 0)

    async def listen_tcp(
        self, host: str = "127.0.0.1", port: int = 10809, *, tls: ssl.SSLContext | None = None
    ) -> str:
        """Accept clients on a TCP port, 0 for any free one; the first export's URI.

        tls: what is demanded of clients (tls.py). Without it there is neither encryption nor a
        password: whoever reaches the port owns the disk. Raises `ConfigError` if the port cannot be
        had.
        """
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            family, address = found[0][0], found[0][4]
            listener = socket.create_server(address[:2], family=family)
        except OSError as error:
            raise ConfigError(
                f"{host} port {port}: cannot listen there: {describe(error)}"
            ) from error
        self._listen(listener, tls)
        port = listener.getsockname()[1]
        scheme = "nbds" if tls else "nbd"
        return self._listens(f"{scheme}://{_in_uri(host)}:{port}/", "", port)

    def _listens(self, before: str, behind: str, port: int) -> str:
        """Note where: what stands before an export's name in its URI, and behind it."""
        self._places.append((before, behind))
        self._ports.append(port)
        return f"{before}{quote(self.name)}{behind}"

    def _listen(self, listener: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        listener.setblocking(False)
        self._listeners[listener] = tls
        asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except (BlockingIOError, ConnectionError):
            return  # it has gone again
        except OSError as error:
            logger.warning("nbd: no client can be accepted: %s", describe(error))
            loop = asyncio.get_running_loop()
            loop.remove_reader(listener)
            loop.call_later(_RETRY_S, self._accept_again, listener)
            return
        NbdConnection(self, client, self._listeners[listener])

    def _accept_again(self, listener: socket.socket) -> None:
        if not self._closed:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    @property
    def uris(self) -> list[str]:
        """Return the URIs of every export, for each place in the order of the calls to listen."""
        return [
            f"{before}{quote(name)}{behind}"
            for before, behind in self._places for name in self._exported
        ]  # fmt: skip

    @property
    def ports(self) -> list[int]:
        """Return the TCP port of each place in the order of the calls to listen; 0 of a socket."""
        return list(self._ports)

    @property
    def uri(self) -> str:
        """The first of `uris`; raises `ConfigError` when the server listens nowhere."""
        if not self._places:
            raise ConfigError("the NBD server listens nowhere yet; call listen_unix or listen_tcp")
        return self.uris[0]

    # ---- The connections' side ----

    def exports(self) -> list[Export]:
        """Describe the disks to a client that arrives now."""
        return [_describe(it) for it in self._exported.values()]

    def exported(self, name: str) -> tuple[ExportedDisk, Storage | None]:
        """The disk of that name, and its storage where it is at hand."""
        found = self._exported[name]
        return found.disk, found.storage

    def secured(self, client: socket.socket, tls: ssl.SSLContext) -> socket.socket:
        """Do the server's part of TLS on a client's socket; what is spoken within it goes through
        the socket that is returned."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        task = asyncio.get_running_loop().create_task(relay(client, theirs, tls, self.patience_s))
        self._relays.add(task)
        task.add_done_callback(self._relays.discard)
        return ours

    def arrived(self, connection: NbdConnection) -> bool:
        """Note a client; False if it has to go."""
        self.count["connections"] += 1
        self._connections.add(connection)
        self._nobody.clear()
        taken = sum(not other.ending for other in self._connections)
        if self._closed or (taken > self._connections_max and not self._make_place()):
            self.count["turned_away"] += 1
            return False
        return True

    def _make_place(self) -> bool:
        """Let the client go that has been idle for longest, or else one that has kept us waiting in
        the middle of a request or of a reply; False if there is neither."""
        idle = {c: seconds for c in self._connections if (seconds := c.idle_s) is not None}
        stalled = (c for c in self._connections if c.holds_for_nothing(self.patience_s))
        found = max(idle, key=idle.__getitem__) if idle else next(stalled, None)
        if found is None:
            return False
        self.count["idle_cut"] += 1
        found.abort()
        return True

    # ---- Memory ----

    def _memory_is_short(self) -> None:
        """Serve who waits for memory, which may be free now."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.memory.bell)
        for connection in self._connections:
            connection.wake()
        if self._relief is None:
            loop = asyncio.get_running_loop()
            self._relief = loop.call_later(self.patience_s, self._relieve)

    def _relieve(self) -> None:
        """Cut off who holds memory and does nothing with it, while somebody waits for some."""
        self._relief = None
        if not self.memory.starved:
            return
        for connection in list(self._connections):
            if connection.holds_for_nothing(self.patience_s):
                self.count["idle_cut"] += 1
                connection.abort()
        self._memory_is_short()

    def left(self, connection: NbdConnection) -> None:
        """Forget a client."""
        self._connections.discard(connection)
        if not self._connections:
            self._nobody.set()

    def counters(self) -> dict[str, int]:
        """Figures by name.

        Now: connected, in_flight (requests), held_bytes (their data and replies not yet read).
        Since the server was made: connections, turned_away, idle_cut (for another's sake),
        handshakes, malformed, requests, rejected (asked for the impossible), failed (by the disk),
        bytes_read, bytes_written.
        """
        names = (
            *("connections", "turned_away", "idle_cut", "handshakes", "malformed"),
            *("requests", "rejected", "failed", "bytes_read", "bytes_written"),
        )
        now = {
            "connected": len(self._connections),
            "in_flight": sum(connection.in_flight for connection in self._connections),
            "held_bytes": sum(connection.held_bytes for connection in self._connections),
        }
        count = self.count.copy()
        for connection in self._connections:
            count.update(connection.counters())
        return now | {name: count[name] for name in names}

    # ---- Closing ----

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Stop listening, answer what is in progress, disconnect everybody. Idempotent.

        What takes longer than `timeout_s` seconds is cut off and cancelled.
        """
        self._closed = True
        if self.memory.bell >= 0:
            asyncio.get_running_loop().remove_reader(self.memory.bell)
        if self._relief is not None:
            self._relief.cancel()
        for claimed in self._claimed:
            claimed.remove()
        self._claimed.clear()
        for listener in self._listeners:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()
        self._listeners.clear()
        for connection in list(self._connections):
            connection.finish()
        try:
            async with asyncio.timeout(timeout_s):
                await self._nobody.wait()
        except TimeoutError:
            for connection in list(self._connections):
                connection.cancel()
            await self._nobody.wait()
        if self._relays:  # the last replies may be on their way to the client still
            _, late = await asyncio.wait(self._relays, timeout=timeout_s)
            for relay_of_one in late:
                relay_of_one.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        self.memory.close()


def _describe(exported: _Exported) -> Export:
    """Describe a disk as it is now."""
    disk = exported.disk
    flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.CAN_MULTI_CONN | TransmissionFlag.SEND_DF
    if disk.can_flush:
        flags |= TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA
    if disk.read_only:
        flags |= TransmissionFlag.READ_ONLY
    else:
        flags |= TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO
        if disk.can_discard:
            flags |= TransmissionFlag.SEND_TRIM
    preferred = min(max(disk.physical_block_size, RING_SECTOR_SIZE), _PREFERRED_MAX)
    return Export(
        exported.name, exported.description, disk.size, int(flags), preferred, exported.tells_holes
    )


def _in_uri(host: str) -> str:
    try:
        return f"[{host}]" if ipaddress.ip_address(host).version == 6 else host
    except ValueError:
        return host
