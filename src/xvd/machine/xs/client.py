# SPDX-License-Identifier: Apache-2.0
"""An asyncio client of the xenstore wire protocol.

The idea to read it by: one task reads, and hands each reply to the future that waits for its req_id
and each event to the watch that has its token; requests of any number of tasks and transactions are
in flight at once. When the connection ends, for whatever reason, every future and every watch is
told in the same moment, and every later call fails at once: nobody waits for a daemon that died.

The transport is any pair of `Reader` and `Writer`: a unix socket here, and whatever reads and
writes the same messages elsewhere. Because Linux's xenbus device answers WATCH itself, may deliver
a first event before that answer and leaves an event's req_id unset, none of these is relied on.
"""

import asyncio
import itertools
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Final, Protocol, Self, TypeVar

from xvd.errors import PeerClosed, XenstoreError, describe
from xvd.machine.xs import requests
from xvd.machine.xs.messages import (
    PAYLOAD_MAX,
    Framer,
    Message,
    MessageType,
    encode_text,
    join_strings,
    split_strings,
)
from xvd.machine.xs.requests import Request
from xvd.types import Domid, Port

T = TypeVar("T")

_READ_SIZE: Final = 64 * 1024

TRANSACTIONS_MAX: Final = 4
"""That `transact` has open at once. A store lets a guest have ten (quota
"transactions") and refuses the next; more at a time would only conflict more often."""

IN_FLIGHT_MAX: Final = 64
"""Requests that `ask_each` sends before it waits for their answers."""

CONFLICTS_MAX: Final = 200
"""How often `transact` begins again, and from the `CONFLICTS_FREE`th time on after a pause."""

CONFLICTS_FREE: Final = 20
CONFLICT_PAUSE_S: Final = 0.01

WATCH_PENDING_MAX: Final = 1024
"""Different paths that one watch holds for a reader that does not come."""


class Reader(Protocol):
    """Where bytes come from: `asyncio.StreamReader` is one."""

    async def read(self, n: int, /) -> bytes:
        """Return some bytes, at most `n`; none at the end."""


class Writer(Protocol):
    """Where bytes go: `asyncio.StreamWriter` is one. A whole message is one `write`."""

    def write(self, data: bytes, /) -> None:
        """Take bytes to be written."""

    async def drain(self) -> None:
        """Wait until more may be written."""

    def close(self) -> None:
        """Write what was taken and close."""

    async def wait_closed(self) -> None:
        """Wait until it is closed."""


class Watch:
    """A watch that is set: an async iterator of paths that changed, the first at once.

    An event says "read again", so the same path is held once however often it changed; and if
    more than `WATCH_PENDING_MAX` different paths are held, they become one: the watch's own. The
    iteration ends when the watch is closed, and raises `PeerClosed` when the connection is lost.
    For one reader at a time.
    """

    def __init__(self, client: "XenstoreClient", path: str, token: str) -> None:
        self.path = path
        self.token = token
        self._client = client
        self._pending: dict[str, None] = {}
        self._wakeup = asyncio.Event()
        self._ended = False
        self._error: Exception | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        while not self._pending:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._wakeup.clear()
            await self._wakeup.wait()
        path = next(iter(self._pending))
        del self._pending[path]
        return path

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
        """Remove the watch; nothing happens if it, or the connection, is gone already."""
        await self._client.unwatch(self)

    def skip(self) -> None:
        """Drop the events that are held: who reads everything now has seen what they say."""
        self._pending.clear()

    def deliver(self, path: str) -> None:
        """The client's part: an event came."""
        if len(self._pending) >= WATCH_PENDING_MAX and path not in self._pending:
            self._pending.clear()
            path = self.path
        self._pending[path] = None
        self._wakeup.set()

    def end(self, error: Exception | None = None) -> None:
        """The client's part: no event will come; what is held is still read."""
        self._ended = True
        self._error = error
        self._wakeup.set()


class _Operations:
    """What can be asked with and without a transaction. Paths may be relative to the domain's own.

    Every method raises `XenstoreError` with the store's code, and `PeerClosed` if it is gone.
    """

    async def _ask(self, request: Request) -> bytes:
        (answer,) = await self.ask_all([request])
        return answer

    async def _ask_each(self, asked: Sequence[Request]) -> list[bytes | XenstoreError]:
        raise NotImplementedError

    async def ask_each(self, asked: Sequence[Request]) -> list[bytes | XenstoreError]:
        """Send requests without waiting for the answers in between; what each one was answered.

        The store answers them in this order, but others' requests may come between. A refusal
        does not keep it from the rest.
        """
        return await self._ask_each(asked)

    async def ask_all(self, asked: Sequence[Request]) -> list[bytes]:
        """Do as `ask_each` does, and raise the first refusal."""
        answers = []
        for answer in await self.ask_each(asked):
            if isinstance(answer, XenstoreError):
                raise answer
            answers.append(answer)
        return answers

    async def read(self, path: str) -> str:
        """A node's value as text; EINVAL if it is not UTF-8."""
        return _as_text(await self.read_bytes(path), path)

    async def read_bytes(self, path: str) -> bytes:
        """A node's value."""
        return await self._ask(requests.read(path))

    async def try_read(self, path: str) -> str | None:
        """A node's value as text, None if there is no such node."""
        (value,) = await self.try_read_each([path])
        if isinstance(value, XenstoreError):
            raise value
        return value

    async def try_read_each(self, paths: Sequence[str]) -> list[str | XenstoreError | None]:
        """Return the values as `try_read` does, what it would raise in the value's place."""
        found: list[str | XenstoreError | None] = []
        answers = await self.ask_each([requests.read(path) for path in paths])
        for path, answer in zip(paths, answers, strict=True):
            try:
                found.append(_as_text(answer, path))
            except XenstoreError as error:
                found.append(None if error.code == "ENOENT" else error)
        return found

    async def exists(self, path: str) -> bool:
        """Whether there is such a node."""
        return bool(await self.which_exist([path]))

    async def which_exist(self, paths: Sequence[str]) -> list[str]:
        """Return those of `paths` at which there is a node."""
        found = []
        answers = await self.ask_each([requests.read(path) for path in paths])
        for path, answer in zip(paths, answers, strict=True):
            if isinstance(answer, bytes):
                found.append(path)
            elif answer.code != "ENOENT":
                raise answer
        return found

    async def write(self, path: str, value: str | bytes) -> None:
        """Set a node's value, creating the node and those above it; text as UTF-8."""
        await self._ask(requests.write(path, value))

    async def mkdir(self, path: str) -> None:
        """Create a node, empty, and those above it; fine if it exists."""
        await self._ask(requests.mkdir(path))

    async def rm(self, path: str) -> None:
        """Remove a node and all below it; fine if only its parent exists."""
        await self._ask(requests.rm(path))

    async def rm_each(self, paths: Iterable[str]) -> None:
        """Remove nodes and all below them; fine if they, or their parents, are gone already."""
        for answer in await self.ask_each([requests.rm(path) for path in paths]):
            if isinstance(answer, XenstoreError) and answer.code != "ENOENT":
                raise answer

    async def ls(self, path: str) -> list[str]:
        """The children's names in order of creation, however many there are.

        Not for a directory of a peer's: one who adds to it all the time keeps us reading for ever.
        """
        try:
            return await self.ls_short(path)
        except XenstoreError as error:
            if error.code != "E2BIG":
                raise
            names = await self._read_directory_in_parts(path)
        return [name.decode() for name in split_strings(names)]

    async def ls_short(self, path: str) -> list[str]:
        """The children's names, by one request; `XenstoreError` E2BIG if one answer cannot hold
        them (4096 bytes: xs_wire.h, XENSTORE_PAYLOAD_MAX)."""
        names = await self._ask(requests.directory(path))
        return [name.decode() for name in split_strings(names)]

    async def _read_directory_in_parts(self, path: str) -> bytes:
        # Each part tells the node's generation: if it changes the list is begun again.
        generation, names = b"", b""
        while True:
            part = await self._ask(requests.directory_part(path, len(names)))
            current, _, more = part.partition(b"\0")
            if names and current != generation:
                names = b""
                continue
            generation = current
            if more == b"\0" or more.endswith(b"\0\0"):
                return names + more[:-1]
            if not more:
                raise XenstoreError("EIO", f"the store sends an empty part of {path}")
            names += more

    async def get_perms(self, path: str) -> list[str]:
        """A node's permission list: ``["n0", "r1"]`` is dom0's, hidden, and readable by 1."""
        payload = await self._ask(requests.get_perms(path))
        return [entry.decode() for entry in split_strings(payload)]

    async def set_perms(self, path: str, perms: Iterable[str]) -> None:
        """Set a node's permission list; the first entry names the owner."""
        await self._ask(requests.set_perms(path, perms))


class Transaction(_Operations):
    """An open transaction; made by `XenstoreClient.transaction`."""

    def __init__(self, client: "XenstoreClient", tx_id: int) -> None:
        self.tx_id = tx_id
        self._client = client

    async def _ask_each(self, asked: Sequence[Request]) -> list[bytes | XenstoreError]:
        return await self._client.request_each(asked, self.tx_id)


async def open_streams(path: str | os.PathLike[str]) -> tuple[Reader, Writer]:
    """Connect to the xenstore on a unix socket; `PeerClosed` if nobody listens there."""
    try:
        return await asyncio.open_unix_connection(os.fspath(path))
    except OSError as error:
        raise PeerClosed(f"no xenstore answers at {os.fspath(path)}: {describe(error)}") from error


class XenstoreClient(_Operations):
    """One connection to a xenstore. All calls in the event loop's thread, any number at once."""

    def __init__(self, reader: Reader, writer: Writer) -> None:
        self._reader = reader
        self._writer = writer
        self._replies: dict[int, asyncio.Future[bytes]] = {}
        self._watches: dict[str, Watch] = {}
        self._req_ids = itertools.count(1)
        self._tokens = itertools.count(1)
        self._turns = asyncio.Semaphore(TRANSACTIONS_MAX)
        self._error: PeerClosed | None = None
        self._reading = asyncio.get_running_loop().create_task(self._read_all())

    @classmethod
    async def connect(cls, path: str | os.PathLike[str]) -> "XenstoreClient":
        """A client of the xenstore on a unix socket.

        Raises `PeerClosed` if nobody listens there.
        """
        return cls(*await open_streams(path))

    @classmethod
    async def from_socket(cls, sock: socket.socket) -> "XenstoreClient":
        """A client on a connected stream socket, which is the client's from now on."""
        try:
            reader, writer = await asyncio.open_connection(sock=sock)
        except BaseException:
            sock.close()
            raise
        return cls(reader, writer)

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
        """Close the connection: whoever waits on it gets `PeerClosed`, watches end."""
        self._end(PeerClosed("this client of the xenstore was closed"), graceful=True)
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        with suppress(OSError):  # the other end may have gone first
            await self._writer.wait_closed()

    async def request(self, message_type: MessageType, payload: bytes, tx_id: int = 0) -> bytes:
        """Send any request and return the payload of its reply.

        Raises `XenstoreError` E2BIG for a payload that no message can carry, otherwise with the
        store's own code; `PeerClosed` if the connection is or gets lost.
        """
        (answer,) = await self.request_each([(message_type, payload)], tx_id)
        if isinstance(answer, XenstoreError):
            raise answer
        return answer

    async def request_each(
        self, asked: Sequence[Request], tx_id: int = 0
    ) -> list[bytes | XenstoreError]:
        """Send several that do not wait for each other, `IN_FLIGHT_MAX` at a time.

        What the store refuses is returned in its place; `PeerClosed` is raised, and so is E2BIG.
        """
        answers: list[bytes | XenstoreError] = []
        for begin in range(0, len(asked), IN_FLIGHT_MAX):
            replies: list[asyncio.Future[bytes]] = []
            try:
                for request in asked[begin : begin + IN_FLIGHT_MAX]:
                    replies.append(self._send(*request, tx_id))
                await self._drain()
            except BaseException:
                for reply in replies:
                    reply.cancel()
                raise
            for answer in await asyncio.gather(*replies, return_exceptions=True):
                if not isinstance(answer, bytes | XenstoreError):
                    raise answer
                answers.append(answer)
        return answers

    def _send(
        self, message_type: MessageType, payload: bytes, tx_id: int
    ) -> "asyncio.Future[bytes]":
        if self._error is not None:
            raise PeerClosed(str(self._error))
        if len(payload) > PAYLOAD_MAX:
            raise XenstoreError(
                "E2BIG", f"{len(payload)} bytes in a request, at most {PAYLOAD_MAX}"
            )
        req_id = next(self._req_ids) & 0xFFFFFFFF
        # Packed first: a transport may carry less than this.
        self._writer.write(Message(message_type, req_id, tx_id, payload).pack())
        reply = self._replies[req_id] = asyncio.get_running_loop().create_future()
        return reply

    async def _drain(self) -> None:
        try:
            await self._writer.drain()
        except OSError as error:
            self._end(PeerClosed(f"the connection to the xenstore was lost: {describe(error)}"))

    async def _ask_each(self, asked: Sequence[Request]) -> list[bytes | XenstoreError]:
        return await self.request_each(asked)

    async def _ask_domid(self, message_type: MessageType, *numbers: int) -> bytes:
        return await self.request(message_type, join_strings(str(n).encode() for n in numbers))

    async def get_domain_path(self, domid: Domid) -> str:
        """The directory of a domain, ``/local/domain/<domid>``."""
        payload = await self._ask_domid(MessageType.GET_DOMAIN_PATH, domid)
        return payload.rstrip(b"\0").decode()

    async def introduce(self, domid: Domid, gfn: int, port: Port) -> None:
        """Tell the store that a domain exists (dom0 only)."""
        await self._ask_domid(MessageType.INTRODUCE, domid, gfn, port)

    async def release(self, domid: Domid) -> None:
        """Tell the store that a domain is gone (dom0 only)."""
        await self._ask_domid(MessageType.RELEASE, domid)

    async def resume(self, domid: Domid) -> None:
        """Let a later shutdown of a domain be reported again (dom0 only)."""
        await self._ask_domid(MessageType.RESUME, domid)

    async def is_introduced(self, domid: Domid) -> bool:
        """Whether the store knows a domain (dom0 only)."""
        return await self._ask_domid(MessageType.IS_DOMAIN_INTRODUCED, domid) == b"T\0"

    async def set_target(self, domid: Domid, target: Domid) -> None:
        """Give a device model's domain the rights of its target too (dom0 only)."""
        await self._ask_domid(MessageType.SET_TARGET, domid, target)

    async def reset_watches(self) -> None:
        """End all watches and transactions of this connection."""
        await self.request(MessageType.RESET_WATCHES, b"\0")
        for watch in list(self._watches.values()):
            watch.end()
        self._watches.clear()

    async def control(self, *arguments: str) -> str:
        """Send what ``xenstore-control`` sends (dom0 only); return the answer's text."""
        payload = join_strings(encode_text(argument, "the argument") for argument in arguments)
        return (await self.request(MessageType.CONTROL, payload)).rstrip(b"\0").decode()

    async def watch(self, path: str, token: str | None = None, depth: int | None = None) -> Watch:
        """Watch a node and all below it, or `depth` levels of that, or a special ``@`` event.

        The first event comes at once, with the path as given. A token of one's own must not be in
        use in this client (`XenstoreError` EEXIST); a store may not know of depths (EINVAL).
        """
        if token is None:
            token = f"xvd-{next(self._tokens)}"
        if token in self._watches:
            raise XenstoreError("EEXIST", f"the token {token!r} is in use")
        strings = [encode_text(path, "the path"), encode_text(token, "the token")]
        if depth is not None:
            strings.append(str(depth).encode())
        # Known before it is asked for: its first event may come before the answer.
        watch = self._watches[token] = Watch(self, path, token)
        try:
            await self.request(MessageType.WATCH, join_strings(strings))
        except asyncio.CancelledError:
            # It may be set all the same: take it back without waiting.
            self._forget_unanswered(MessageType.UNWATCH, join_strings(strings[:2]))
            self._watches.pop(token, None)
            raise
        except (XenstoreError, PeerClosed):
            self._watches.pop(token, None)
            raise
        return watch

    async def unwatch(self, watch: Watch) -> None:
        """Remove a watch and end its iteration; fine if it is removed already."""
        if self._watches.get(watch.token) is not watch:
            return
        watch.end()
        strings = [watch.path.encode(), watch.token.encode()]
        try:
            with suppress(PeerClosed):
                await self.request(MessageType.UNWATCH, join_strings(strings))
        finally:
            self._watches.pop(watch.token, None)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """A transaction for the length of a ``with``: committed at its end, aborted on exception.

        The end raises `XenstoreError` EAGAIN if another changed what it read: repeat all, or
        let `transact` do it.
        """
        tx = Transaction(self, await self._start_transaction())
        try:
            yield tx
        except BaseException:
            self._forget_unanswered(MessageType.TRANSACTION_END, b"F\0", tx.tx_id)
            raise
        await self.request(MessageType.TRANSACTION_END, b"T\0", tx.tx_id)

    async def transact(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        """Run `work` in a transaction until it is committed without a conflict; its result.

        `work` is called again, with a new transaction, after each conflict: `CONFLICTS_MAX` times,
        and then `XenstoreError` EAGAIN, as a peer may write to what is read for as long as it
        likes. It may have to wait for `TRANSACTIONS_MAX` others, so it must not call `transact`
        itself.
        """
        for conflict in range(CONFLICTS_MAX):
            async with self._turns:
                try:
                    async with self.transaction() as tx:
                        return await work(tx)
                except XenstoreError as error:
                    if error.code != "EAGAIN":
                        raise
            if conflict >= CONFLICTS_FREE:
                await asyncio.sleep(CONFLICT_PAUSE_S)
        raise XenstoreError("EAGAIN", f"{CONFLICTS_MAX} transactions in a row met a conflict")

    async def _start_transaction(self) -> int:
        starting = asyncio.ensure_future(self.request(MessageType.TRANSACTION_START, b"\0"))
        try:
            payload = await asyncio.shield(starting)
        except asyncio.CancelledError:
            # The store opens it all the same; an open transaction nobody ends counts for ever.
            starting.add_done_callback(self._abort_started)
            raise
        return _transaction_id(payload)

    def _abort_started(self, starting: asyncio.Future[bytes]) -> None:
        if not starting.cancelled() and starting.exception() is None:
            tx_id = _transaction_id(starting.result())
            self._forget_unanswered(MessageType.TRANSACTION_END, b"F\0", tx_id)

    def _forget_unanswered(self, message_type: MessageType, payload: bytes, tx_id: int = 0) -> None:
        # A request whose answer nobody needs: its reply finds no future and is dropped.
        if self._error is None:
            req_id = next(self._req_ids) & 0xFFFFFFFF
            self._writer.write(Message(message_type, req_id, tx_id, payload).pack())

    async def _read_all(self) -> None:
        framer = Framer()
        reason = "the xenstore closed the connection"
        try:
            while data := await self._reader.read(_READ_SIZE):
                framer.feed(data)
                while (message := framer.next_message()) is not None:
                    self._dispatch(message)
        except (OSError, XenstoreError, ValueError) as caught:
            reason = f"the connection to the xenstore was lost: {caught}"
        finally:
            self._end(PeerClosed(reason))

    def _dispatch(self, message: Message) -> None:
        if message.type == MessageType.WATCH_EVENT:
            path, token, *_ = [*split_strings(message.payload), b"", b""]
            watch = self._watches.get(token.decode(errors="replace"))
            if watch is not None:
                watch.deliver(path.decode(errors="replace"))
            return
        reply = self._replies.pop(message.req_id, None)
        if reply is None or reply.done():
            return
        if message.type == MessageType.ERROR:
            reply.set_exception(XenstoreError(message.payload.rstrip(b"\0").decode("latin-1")))
        else:
            reply.set_result(message.payload)

    def _end(self, error: PeerClosed, graceful: bool = False) -> None:
        if self._error is None:
            self._error = error
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(PeerClosed(str(self._error)))
        self._replies.clear()
        for watch in self._watches.values():
            watch.end(None if graceful else PeerClosed(str(self._error)))
        self._watches.clear()
        self._writer.close()


def _transaction_id(payload: bytes) -> int:
    try:
        return int(payload.rstrip(b"\0"))
    except ValueError as error:
        raise XenstoreError("EIO", f"the store names a transaction {payload!r}") from error


def _as_text(value: bytes | XenstoreError, path: str) -> str:
    if isinstance(value, XenstoreError):
        raise value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise XenstoreError("EINVAL", f"the value of {path} is not text") from error
