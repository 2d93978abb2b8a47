# SPDX-License-Identifier: Apache-2.0
"""A worker's connection to xenstore: it sees and changes its guest's disks, and nothing else.

Each worker has a connection of its own behind this, so transactions and watches are kept apart.
Requests are looked at; what the store says goes through as it is.
"""

import asyncio
import contextlib
import re
import socket
from collections.abc import Sequence
from typing import Final

from xvd.blkif.assignment import TOOLSTACK_NODES
from xvd.errors import XenstoreError
from xvd.machine.xs.client import Reader, Writer
from xvd.machine.xs.messages import Framer, Message, MessageType, domain_path, split_strings
from xvd.types import Domid

_READ_SIZE: Final = 1 << 13
"""So little at a time, that one that sends without end leaves time to others."""

_READING: Final = frozenset(
    {
        MessageType.DIRECTORY, MessageType.DIRECTORY_PART, MessageType.READ, MessageType.GET_PERMS,
        MessageType.WATCH,
    }
)  # fmt: skip
_WRITING: Final = frozenset({MessageType.WRITE, MessageType.MKDIR, MessageType.RM})
_HARMLESS: Final = frozenset(
    {MessageType.UNWATCH, MessageType.TRANSACTION_START, MessageType.TRANSACTION_END}
)


class Rules:
    """What the processes of a guest may do in the store of domain `own`.

    domains: the guest's. kinds: of the disks that are served.
    """

    def __init__(self, own: Domid, domains: Sequence[int], kinds: Sequence[str]) -> None:
        self._home = domain_path(own)
        numbers = "|".join(str(int(domain)) for domain in domains)
        disks = rf"{self._home}/backend/(?:{'|'.join(map(re.escape, kinds))})/(?:{numbers})"
        errors = disks.replace("/backend/", "/error/backend/", 1)
        self._read = re.compile(
            rf"({disks}|{errors}|/local/domain/({numbers}))(/.*)?"
            rf"|{self._home}/error(/backend(/[^/]+)?)?"
            rf"|/libxl/({numbers})/type"
        )
        self._write = re.compile(rf"{disks}/[^/]+(/(?P<node>[^/]+)(/.*)?)?|{errors}(/.*)?")

    def allow(self, message: Message) -> bool:
        """Whether a request may go through."""
        if message.type in _HARMLESS:
            return True
        path = split_strings(message.payload + b"\0")[0].decode("latin-1")
        if not path.startswith("/"):
            path = f"{self._home}/{path}"
        if message.type in _READING:
            return bool(self._read.fullmatch(path))
        if message.type not in _WRITING:
            return False
        found = self._write.fullmatch(path)
        if found is None or found["node"] in TOOLSTACK_NODES:
            return False
        return message.type == MessageType.RM or found["node"] is not None or "/error/" in path


class StoreGate:
    """One worker's connection, from construction until either end closes. For the event loop's
    thread. reader, writer: the store's side, ours from now on; theirs: the worker's end."""

    def __init__(self, reader: Reader, writer: Writer, rules: Rules) -> None:
        self._store = reader, writer
        self._rules = rules
        self._ours, self.theirs = socket.socketpair()
        self._worker: asyncio.StreamWriter | None = None
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Cut it off. It may be ending by itself just now, as its worker has ended."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self._worker is not None:
            self._worker.transport.abort()
        else:
            self._ours.close()
        self.theirs.close()
        _, store = self._store
        store.close()
        with contextlib.suppress(OSError):
            await store.wait_closed()

    async def _run(self) -> None:
        reader, writer = await asyncio.open_connection(sock=self._ours)
        self._worker = writer
        ways = (
            asyncio.create_task(self._to_store(reader, writer)),
            asyncio.create_task(self._to_worker(writer)),
        )
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for end in (writer, self._store[1]):
                end.close()

    async def _to_store(self, reader: asyncio.StreamReader, worker: asyncio.StreamWriter) -> None:
        framer, (_, store) = Framer(), self._store
        while data := await reader.read(_READ_SIZE):
            framer.feed(data)
            try:
                while message := framer.next_message():
                    if self._rules.allow(message):
                        store.write(message.pack())
                    else:
                        worker.write(_refusal(message).pack())
            except XenstoreError:
                return  # it talks nonsense: it is cut off
            await store.drain()
            await worker.drain()

    async def _to_worker(self, worker: asyncio.StreamWriter) -> None:
        reader, _ = self._store
        while data := await reader.read(_READ_SIZE):
            worker.write(data)
            await worker.drain()


def _refusal(message: Message) -> Message:
    return Message(MessageType.ERROR, message.req_id, message.tx_id, b"EACCES\0")
