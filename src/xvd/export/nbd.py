# SPDX-License-Identifier: Apache-2.0
"""A disk as an NBD export, so that ordinary tools (qemu-img, fio, nbdcopy, nbdfuse) can use it.

One disk behind any number of connections: what one client was told is written, every other one
reads, and the flush of one makes it durable for all (NBD's CAN_MULTI_CONN).
"""

import asyncio
import contextlib
import ipaddress
import logging
import os
import socket
from collections import Counter
from types import TracebackType
from typing import Final, Self
from urllib.parse import quote

from xvd.errors import ConfigError, describe
from xvd.export.memory import ExportMemory
from xvd.export.nbd_connection import NbdConnection
from xvd.export.nbd_negotiation import Export
from xvd.export.nbd_protocol import STRING_MAX, TransmissionFlag
from xvd.export.nbd_requests import ExportedDisk, Storage
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


class NbdServer:
    """Serves `disk` under `name`, which the empty name means too. All calls in the event loop.

    storage: the disk's, where it is at hand. tells_holes: whether it knows where it has data.

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
        for text in (name, description):
            if len(text.encode()) > STRING_MAX or "\0" in text:
                raise ConfigError(f"{text[:40]!r}...: NBD has room for {STRING_MAX} bytes, no NUL")
        self.disk = disk
        self.storage = storage
        self._tells_holes = storage is not None and tells_holes
        self.name = name
        self.description = description
        self.count: Counter[str] = Counter()
        self.patience_s = patience_s
        self.memory = ExportMemory(memory_max)
        self._connections_max = connections_max
        self._relief: asyncio.TimerHandle | None = None
        asyncio.get_running_loop().add_reader(self.memory.bell, self._memory_is_short)
        self._connections: set[NbdConnection] = set()
        self._listeners: list[socket.socket] = []
        self._claimed: list[UnixListener] = []
        self._uris: list[str] = []
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

    # ---- Listening ----

    async def listen_unix(self, path: str | os.PathLike[str], mode: int = 0o660) -> str:
        """Accept clients on a unix socket; its URI.

        A socket that nobody answers is replaced. Raises `ConfigError` if a live server answers
        there, if `path` is not a socket, or if none can be made there.
        """
        claimed = claim(path, mode=mode)
        self._claimed.append(claimed)
        self._listen(claimed.socket)
        # NBD's URI document (doc/uri.md): nbd+unix:///NAME?socket=PATH
        self._uris.append(f"nbd+unix:///{quote(self.name)}?socket={quote(str(claimed.path))}")
        return self._uris[-1]

    async def listen_tcp(self, host: str = "127.0.0.1", port: int = 10809) -> str:
        """Accept clients on a TCP port, 0 for any free one; its URI.

        There is neither encryption nor a password: whoever reaches the port owns the disk. Raises
        `ConfigError` if the port cannot be had.
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
        self._listen(listener)
        port = listener.getsockname()[1]
        self._uris.append(f"nbd://{_in_uri(host)}:{port}/{quote(self.name)}")
        return self._uris[-1]

    def _listen(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        self._listeners.append(listener)
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
        NbdConnection(self, client)

    def _accept_again(self, listener: socket.socket) -> None:
        if not self._closed:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    @property
    def uris(self) -> list[str]:
        """Return the URIs of the export, in the order of the calls to listen."""
        return list(self._uris)

    @property
    def uri(self) -> str:
        """The first of `uris`; raises `ConfigError` when the server listens nowhere."""
        if not self._uris:
            raise ConfigError("the NBD server listens nowhere yet; call listen_unix or listen_tcp")
        return self._uris[0]

    # ---- The connections' side ----

    def export(self) -> Export:
        """Describe the disk to a client that arrives now."""
        disk = self.disk
        flags = (
            TransmissionFlag.HAS_FLAGS | TransmissionFlag.CAN_MULTI_CONN | TransmissionFlag.SEND_DF
        )
        if disk.can_flush:
            flags |= TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_FUA
        if disk.read_only:
            flags |= TransmissionFlag.READ_ONLY
        else:
            flags |= TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO
            if disk.can_discard:
                flags |= TransmissionFlag.SEND_TRIM
        preferred = min(max(disk.physical_block_size, RING_SECTOR_SIZE), _PREFERRED_MAX)
        known = self._tells_holes
        return Export(self.name, self.description, disk.size, int(flags), preferred, known)

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
        self.memory.close()


def _in_uri(host: str) -> str:
    try:
        return f"[{host}]" if ipaddress.ip_address(host).version == 6 else host
    except ValueError:
        return host
