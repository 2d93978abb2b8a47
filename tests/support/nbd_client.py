# SPDX-License-Identifier: Apache-2.0
"""A tiny NBD client that says whatever it is told to, right or wrong. Blocking.

It packs its own bytes, so that a mistake in the server's layouts is not made twice.
"""

import socket
import struct
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

NO_ZEROES_AND_FIXED = 3


class Reply(NamedTuple):
    """A simple reply (kind None) or one chunk; data is what a chunk holds, whole."""

    cookie: int
    error: int
    kind: int | None = None
    data: bytes = b""


class NbdClient:
    """One connection, as far as the last call has brought it."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(10)
        self.socket.connect(str(path))
        self.size = self.flags = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            piece = self.socket.recv(length - len(data))
            if not piece:
                raise EOFError(f"{len(data)} of {length} bytes, then the end")
            data += piece
        return data

    def until_end(self) -> bytes:
        """Everything up to the server's closing."""
        data = b""
        try:
            while piece := self.socket.recv(65536):
                data += piece
        except ConnectionResetError:
            pass  # closed with bytes of ours unread: closed all the same
        return data

    # ---- Negotiation ----

    def greet(self, flags: int = NO_ZEROES_AND_FIXED) -> bytes:
        greeting = self.receive(18)
        self.send(struct.pack(">I", flags))
        return greeting

    def send_option(self, option: int, data: bytes = b"") -> None:
        self.send(b"IHAVEOPT" + struct.pack(">II", option, len(data)) + data)

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; its replies as (type, data) up to the last."""
        self.send_option(option, data)
        replies = []
        while True:
            magic, about, kind, length = struct.unpack(">QIII", self.receive(20))
            assert (magic, about) == (0x3E889045565A9, option)
            replies.append((kind, self.receive(length)))
            if kind == 1 or kind >> 31:
                return replies

    def go(self, name: str = "", *, structured: bool = False, contexts: bool = False) -> Self:
        """Negotiate as most clients do, up to the first request."""
        self.greet()
        text = struct.pack(">I", len(name)) + name.encode()
        if structured:
            assert self.option(8) == [(1, b"")]
        if contexts:
            query = b"base:allocation"
            data = text + struct.pack(">II", 1, len(query)) + query
            assert self.option(10, data)[-1] == (1, b"")
        replies = self.option(7, text + b"\0\0")
        assert replies[-1] == (1, b""), replies
        _, self.size, self.flags = struct.unpack(">HQH", replies[0][1])
        return self

    # ---- Requests ----

    def request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        cookie: int = 7,
        payload: bytes = b"",
    ) -> None:
        header = struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length)
        self.send(header + payload)

    def reply(self) -> Reply:
        """A simple reply's header, or a chunk whole."""
        (magic,) = struct.unpack(">I", self.receive(4))
        if magic == 0x67446698:
            error, cookie = struct.unpack(">IQ", self.receive(12))
            return Reply(cookie, error)
        assert magic == 0x668E33EF, hex(magic)
        flags, kind, cookie, length = struct.unpack(">HHQI", self.receive(16))
        assert flags == 1
        data = self.receive(length)
        error = struct.unpack(">I", data[:4])[0] if kind >> 15 else 0
        return Reply(cookie, error, kind, data)

    def read(self, offset: int, length: int) -> bytes:
        """A read that must succeed, answered by a simple reply."""
        self.request(0, offset, length)
        assert self.reply() == Reply(7, 0)
        return self.receive(length)

    def write(self, offset: int, data: bytes, *, flags: int = 0) -> int:
        """A write; its error number."""
        self.request(1, offset, len(data), payload=data, flags=flags)
        return self.reply().error

    def ask(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0) -> int:
        """A request without data in either direction; its error number."""
        self.request(command, offset, length, flags=flags)
        return self.reply().error
