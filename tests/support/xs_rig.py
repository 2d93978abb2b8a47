# SPDX-License-Identifier: Apache-2.0
"""Ways into a xenstore for tests: straight into the store, or over sockets in one event loop."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from xvd.errors import XenstoreError
from xvd.machine.emulated.xenstore import XenstoreStore
from xvd.machine.emulated.xenstore_domains import Quotas
from xvd.machine.xs.client import XenstoreClient
from xvd.machine.xs.messages import Message, MessageType, join_strings, split_strings
from xvd.machine.xs.server import XenstoreServer
from xvd.types import Domid

T = MessageType


class Caller:
    """A client without a socket: asks the store directly and keeps the events it is sent."""

    def __init__(self, store: XenstoreStore, domid: int = 0) -> None:
        self.replies: list[Message] = []
        self.unread: list[tuple[str, str]] = []
        self.dropped = False
        self.connection = store.connect(Domid(domid), self._take, self._drop)

    def _take(self, message: Message) -> None:
        if message.type == T.WATCH_EVENT:
            path, token = split_strings(message.payload)
            self.unread.append((path.decode(), token.decode()))
        else:
            self.replies.append(message)

    def _drop(self) -> None:
        self.dropped = True

    def events(self) -> list[tuple[str, str]]:
        """Events since the last call: (path, token)."""
        unread, self.unread = self.unread, []
        return unread

    def ask(self, kind: int, payload: bytes, tx_id: int = 0) -> bytes:
        self.connection.handle(Message(kind, 7, tx_id, payload))
        reply = self.replies.pop()
        assert (reply.req_id, reply.tx_id, self.replies) == (7, tx_id, [])
        if reply.type == T.ERROR:
            raise XenstoreError(reply.payload.rstrip(b"\0").decode())
        assert reply.type == kind
        return reply.payload

    def _strings(self, kind: int, *strings: str, tx: int = 0) -> bytes:
        return self.ask(kind, join_strings(string.encode() for string in strings), tx)

    def read(self, path: str, tx: int = 0) -> bytes:
        return self._strings(T.READ, path, tx=tx)

    def write(self, path: str, value: bytes = b"", tx: int = 0) -> None:
        self.ask(T.WRITE, path.encode() + b"\0" + value, tx)

    def mkdir(self, path: str, tx: int = 0) -> None:
        self._strings(T.MKDIR, path, tx=tx)

    def rm(self, path: str, tx: int = 0) -> None:
        self._strings(T.RM, path, tx=tx)

    def ls(self, path: str, tx: int = 0) -> list[str]:
        return [name.decode() for name in split_strings(self._strings(T.DIRECTORY, path, tx=tx))]

    def get_perms(self, path: str, tx: int = 0) -> list[str]:
        return [perm.decode() for perm in split_strings(self._strings(T.GET_PERMS, path, tx=tx))]

    def set_perms(self, path: str, *perms: str, tx: int = 0) -> None:
        self._strings(T.SET_PERMS, path, *perms, tx=tx)

    def watch(self, path: str, token: str, *depth: str) -> None:
        self._strings(T.WATCH, path, token, *depth)

    def unwatch(self, path: str, token: str) -> None:
        self._strings(T.UNWATCH, path, token)

    def start(self) -> int:
        return int(self.ask(T.TRANSACTION_START, b"\0").rstrip(b"\0"))

    def end(self, tx: int, how: str = "T") -> None:
        self._strings(T.TRANSACTION_END, how, tx=tx)

    def introduce(self, domid: int) -> None:
        self._strings(T.INTRODUCE, str(domid), "0", "5")

    def release(self, domid: int) -> None:
        self._strings(T.RELEASE, str(domid))


def store_with_guests(*domids: int, quotas: Quotas | None = None) -> tuple[XenstoreStore, Caller]:
    """A store and dom0's way into it; each guest is introduced and owns its own directory."""
    store = XenstoreStore(quotas)
    dom0 = Caller(store)
    for domid in domids:
        dom0.introduce(domid)
        dom0.mkdir(f"/local/domain/{domid}")
        dom0.set_perms(f"/local/domain/{domid}", f"n{domid}")
    return store, dom0


@asynccontextmanager
async def served(path: Path, **options: int) -> AsyncIterator[XenstoreServer]:
    """A fresh store on a unix socket at `path`, closed at the end."""
    server = XenstoreServer(XenstoreStore(), **options)
    await server.listen(path)
    try:
        yield server
    finally:
        await server.close()


def with_server(
    path: Path, work: Callable[[XenstoreServer, XenstoreClient], Awaitable[None]], **options: int
) -> None:
    """Run `work` with a server and dom0's client of it, in an event loop of their own."""

    async def run() -> None:
        async with served(path, **options) as server:
            async with await XenstoreClient.connect(path) as client:
                await work(server, client)

    asyncio.run(run())
