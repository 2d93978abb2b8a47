# SPDX-License-Identifier: Apache-2.0
"""The same machine for several processes: the host's slow path over a unix socket.

A connection is a session: it ends when the socket closes, and so when the process dies, however it
dies. Requests and answers are JSON in one packet each, descriptors travel beside them. Mapping,
copying and notifying need no message: they happen in the shared memory that the descriptors name.

On the host's side every connection has a thread, because a call may only block its own client.

`LinkClient` is the table of the calls: each row says what does it on the host's side, and how the
outcome travels. The server finds the row by its name.
"""

import array
import asyncio
import os
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import astuple
from enum import Enum, auto
from typing import Any, Concatenate, Final, Generic, NamedTuple, ParamSpec, TypeVar

import msgspec

from xvd.errors import (
    ConfigError,
    DiskInUse,
    EventChannelError,
    GrantError,
    PeerClosed,
    XvdError,
    describe,
)
from xvd.machine.emulated.host import Host, Session
from xvd.machine.emulated.limits import Limits
from xvd.sockets import UnixListener, claim
from xvd.types import Domid, Gref, Port

_PACKET_MAX = 256 * 1024
_FDS_MAX = 4
_PROTOCOL = 1


class Request(msgspec.Struct, array_like=True):
    """A call and its numbers."""

    call: str
    arguments: list[int] = []


class Answer(msgspec.Struct, array_like=True):
    """A call's outcome; `error` is empty if it succeeded."""

    result: Any = None
    error: str = ""
    text: str = ""
    number: int = 0


_ERRORS: dict[str, Callable[[str, int], XvdError]] = {
    "grant": GrantError,
    "evtchn": EventChannelError,
    "busy": lambda text, _: DiskInUse(text),
    "config": lambda text, _: ConfigError(text),
}


def _send(sock: socket.socket, message: msgspec.Struct, fds: list[int]) -> None:
    data = msgspec.json.encode(message)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], rights)


def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    data, fds, _, _ = socket.recv_fds(sock, _PACKET_MAX, _FDS_MAX)
    for fd in fds:
        os.set_inheritable(fd, False)
    return data, fds


def _send_away(sock: socket.socket, message: msgspec.Struct, fds: list[int]) -> None:
    """Send, and keep none of the descriptors."""
    try:
        _send(sock, message, fds)
    finally:
        for fd in fds:
            os.close(fd)


class LinkServer:
    """Serves a host to other processes.

    open_xenstore: gives a connected socket to the store under a domain's identity; it is called in
    the event loop's thread. `listen` and `close` belong there too.
    """

    def __init__(self, host: Host, open_xenstore: Callable[[Domid], socket.socket]) -> None:
        self.host = host
        self._open_xenstore = open_xenstore
        self._events = asyncio.get_running_loop()
        self._listener: UnixListener | None = None
        self._clients: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._acceptor: threading.Thread | None = None

    def listen(self, path: str | os.PathLike[str]) -> None:
        """Accept clients at `path`, mode 0660; `ConfigError` if a live host answers there."""
        self._listener = claim(path, kind=socket.SOCK_SEQPACKET)
        self._acceptor = self._start(self._accept, self._listener.socket)

    def _start(
        self, work: Callable[[socket.socket], None], sock: socket.socket
    ) -> threading.Thread:
        def run() -> None:
            try:
                work(sock)
            finally:
                self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name="xvd-link", daemon=True)
        self._threads.add(thread)
        thread.start()
        return thread

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return  # closed: the host ends
            self._clients.add(client)
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        """Serve one client, from its `open` to its end; what it held is given back then."""
        caller: _Client | None = None
        try:
            while True:
                data, fds = _receive(client)
                for fd in fds:
                    os.close(fd)
                if not data:
                    return
                request = msgspec.json.decode(data, type=Request)
                if caller is None:
                    caller = self._open(client, request)
                    if caller is None:
                        return
                else:
                    _send_away(client, *caller.answer(request))
        except (OSError, msgspec.MsgspecError):
            return  # a client that breaks off, or talks nonsense, is gone
        finally:
            if caller is not None:
                caller.session.close()
            self._clients.discard(client)
            client.close()

    def _open(self, client: socket.socket, request: Request) -> "_Client | None":
        try:
            caller = _Client(self, request)
        except GrantError as error:
            _send(client, Answer(error="grant", text=str(error), number=error.status), [])
        except XvdError as error:
            _send(client, Answer(error="config", text=str(error)), [])
        else:
            try:
                _send(client, Answer(caller.session.number), [])
            except OSError:
                caller.session.close()
                raise
            return caller
        return None

    def xenstore(self, domid: Domid) -> socket.socket:
        """A store connection, made in the event loop's thread. For the clients' threads."""

        async def connect() -> socket.socket:
            return self._open_xenstore(domid)

        return asyncio.run_coroutine_threadsafe(connect(), self._events).result()

    def close(self) -> None:
        """Stop listening and cut every client off."""
        if self._listener is not None:
            self._listener.remove()
            self._listener.socket.shutdown(socket.SHUT_RDWR)
            self._listener.socket.close()
            self._listener = None
        if self._acceptor is not None:
            self._acceptor.join()  # or it could be starting a client's thread while we join those
        for client in list(self._clients):
            try:
                client.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it went by itself
        for thread in list(self._threads):
            thread.join()


class _Client:
    """One client of the server; made by its first request, ``["open", [protocol, domid]]``."""

    def __init__(self, server: LinkServer, first: Request) -> None:
        if first.call != "open" or len(first.arguments) != 2 or first.arguments[0] != _PROTOCOL:
            raise ConfigError("the two ends of the machine socket are different versions of xvd")
        self.server = server
        self.session: Session = server.host.open(Domid(first.arguments[1]))
        self.peers: frozenset[int] | None = None
        """The only domains that it may have to do with; None: all."""

    def restrict(self, *domids: int) -> None:
        """Have to do with these domains only, from now on and for good, and with nothing else of
        the host's."""
        wanted = frozenset(domids)
        self.peers = wanted if self.peers is None else self.peers & wanted

    def answer(self, request: Request) -> tuple[Answer, list[int]]:
        """Do a call: its answer, and the descriptors that go with it."""
        row = _CALLS.get(request.call)
        try:
            if row is None:
                raise ConfigError(f"the machine has no call {request.call!r}")
            row.check(self, request.arguments)
            return row.serve(self, request.arguments)
        except GrantError as error:
            return Answer(error="grant", text=str(error), number=error.status), []
        except EventChannelError as error:
            return Answer(error="evtchn", text=str(error), number=error.errno), []
        except DiskInUse as error:
            return Answer(error="busy", text=str(error)), []
        except (ConfigError, TypeError, ValueError, IndexError) as error:
            return Answer(error="config", text=str(error)), []


# ---- How outcomes travel: to (numbers, descriptors) and back ----

_P = ParamSpec("_P")
_R = TypeVar("_R")


class _Way(NamedTuple, Generic[_R]):
    """One way for an outcome: what becomes the answer's result and descriptors, and back."""

    pack: Callable[[_R], tuple[Any, list[int]]]
    unpack: Callable[[Any, list[int]], _R]


_NOTHING: Final = _Way[None](lambda _: (None, []), lambda *_: None)
_NUMBERS: Final = _Way[dict[str, int]](lambda numbers: (numbers, []), lambda it, _: dict(it))
_PAGES: Final = _Way[tuple[int, list[Gref]]](
    lambda pages: (pages, []), lambda it, _: (it[0], it[1])
)
_CHANNEL: Final = _Way[tuple[Port, int, int]](
    lambda end: (end[0], [end[1], end[2]]), lambda port, fds: (Port(port), fds[0], fds[1])
)
_STATE: Final = _Way[tuple[int, int, Limits]](
    lambda state: (astuple(state[2]), [state[0], state[1]]),
    lambda numbers, fds: (fds[0], fds[1], Limits(*numbers)),
)
_SOCKET: Final = _Way[socket.socket](
    lambda end: (None, [end.detach()]), lambda _, fds: socket.socket(fileno=fds[0])
)


# ---- The calls ----


class _Takes(Enum):
    """What a call's arguments name, for a client that is restricted to a few domains."""

    OWN = auto()
    """Nothing of others."""
    PEER = auto()
    """Another domain, in the first one."""
    HOST = auto()
    """Whatever there is on the host."""


class _Remote(Generic[_P, _R]):
    """A row of the table: a function of the host's side, and on the client's the same call.

    giving_back: nothing happens where the host is gone, which has it all then.
    """

    def __init__(
        self,
        work: Callable[Concatenate[_Client, _P], _R],
        way: _Way[_R],
        *,
        takes: _Takes = _Takes.OWN,
        giving_back: bool = False,
    ) -> None:
        self._work = work
        self._takes = takes
        self._way = way
        self._giving_back = giving_back

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def check(self, client: _Client, arguments: Sequence[int]) -> None:
        """Raise `ConfigError` where a client that is restricted wants more."""
        if client.peers is None or self._takes is _Takes.OWN:
            return
        if self._takes is _Takes.HOST or arguments[0] not in {*client.peers, client.session.domid}:
            raise ConfigError(f"this connection may not {self._name}{tuple(arguments)}")

    def serve(self, client: _Client, arguments: Sequence[int]) -> tuple[Answer, list[int]]:
        """Do the call for a client."""
        outcome = self._work(client, *arguments)  # type: ignore[arg-type, call-arg]
        result, fds = self._way.pack(outcome)
        return Answer(result), fds

    def __get__(self, link: "LinkClient", owner: type) -> Callable[_P, _R]:
        def call(*arguments: _P.args, **_keywords: _P.kwargs) -> _R:
            try:
                result, fds = link.call(self._name, *arguments)  # type: ignore[arg-type]
                return self._way.unpack(result, fds)
            except PeerClosed:
                if not self._giving_back:
                    raise
                return self._way.unpack(None, [])

        return call


def _own(call: Callable[Concatenate[Session, _P], _R]) -> Callable[Concatenate[_Client, _P], _R]:
    """A call of the client's own session."""

    def work(client: _Client, /, *arguments: _P.args, **keywords: _P.kwargs) -> _R:
        return call(client.session, *arguments, **keywords)

    return work


def _dom0(call: Callable[Concatenate[Host, _P], _R]) -> Callable[Concatenate[_Client, _P], _R]:
    """A call of the host itself, for domain 0 alone."""

    def work(client: _Client, /, *arguments: _P.args, **keywords: _P.kwargs) -> _R:
        if client.session.domid != 0:
            raise ConfigError("only domain 0 makes, ends and inspects domains")
        return call(client.server.host, *arguments, **keywords)

    return work


def _create_domain(host: Host, domid: Domid) -> None:
    """Make a domain, as `Host.create_domain`, with the host's own limits."""
    host.create_domain(domid)


def _xenstore(client: _Client) -> socket.socket:
    return client.server.xenstore(client.session.domid)


class LinkClient:
    """A session across the socket: `machine.Calls`. Any thread, one call at a time.

    Each call is as the method of that name of `host.Session`; those for dom0 are as `Host`'s.
    `xenstore` gives a connected socket to the store under this domain's identity.

    number: the session's, on its host. Raises `PeerClosed` when the host is gone.
    """

    number: int

    state = _Remote(_own(Session.state), _STATE, takes=_Takes.PEER)
    share = _Remote(_own(Session.share), _PAGES, takes=_Takes.PEER)
    unshare = _Remote(_own(Session.unshare), _NOTHING, giving_back=True)
    alloc_unbound = _Remote(_own(Session.alloc_unbound), _CHANNEL, takes=_Takes.PEER)
    bind_interdomain = _Remote(_own(Session.bind_interdomain), _CHANNEL, takes=_Takes.PEER)
    unbind = _Remote(_own(Session.unbind), _NOTHING, giving_back=True)
    claim = _Remote(_own(Session.claim), _NOTHING)
    disclaim = _Remote(_own(Session.disclaim), _NOTHING, giving_back=True)
    create_domain = _Remote(_dom0(_create_domain), _NOTHING, takes=_Takes.HOST)
    destroy_domain = _Remote(_dom0(Host.destroy_domain), _NOTHING, takes=_Takes.HOST)
    accounting = _Remote(_dom0(Host.accounting), _NUMBERS, takes=_Takes.HOST)
    xenstore = _Remote(_xenstore, _SOCKET, takes=_Takes.HOST)
    restrict = _Remote(_Client.restrict, _NOTHING)

    def __init__(self, path: str | os.PathLike[str], domid: Domid) -> None:
        self._have(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET), domid)
        try:
            self._socket.connect(os.fspath(path))
        except OSError as error:
            self._socket.close()
            raise PeerClosed(
                f"{os.fspath(path)}: no host answers ({error.strerror}); start one: xvd host DIR"
            ) from None
        try:
            self.number = self.call("open", _PROTOCOL, domid)[0]
        except BaseException:
            self._socket.close()
            raise

    def _have(self, sock: socket.socket, domid: Domid) -> None:
        self.domid = domid
        self._lock = threading.Lock()
        self._socket = sock

    @classmethod
    def adopt(cls, sock: socket.socket, domid: Domid, number: int) -> "LinkClient":
        """Go on with a session that another process has opened: its socket, from `detach`, its
        domain and its number."""
        link = cls.__new__(cls)
        link._have(sock, domid)
        link.number = number
        return link

    def detach(self) -> socket.socket:
        """Give the session's socket away; this one is of no use any more."""
        return socket.socket(fileno=self._socket.detach())

    def call(self, call: str, *arguments: int) -> tuple[Any, list[int]]:
        """Ask the host: what it answers, and the descriptors that came with it."""
        try:
            with self._lock:
                _send(self._socket, Request(call, list(arguments)), [])
                data, fds = _receive(self._socket)
        except OSError as error:
            raise PeerClosed(f"the host is gone: {describe(error)}") from None
        if not data:
            raise PeerClosed("the host has closed the connection")
        answer = msgspec.json.decode(data, type=Answer)
        if answer.error:
            raise _ERRORS[answer.error](answer.text, answer.number)
        return answer.result, fds

    def close(self) -> None:
        """End the session."""
        self._socket.close()


_CALLS: Final[dict[str, _Remote[..., Any]]] = {
    name: row for name, row in vars(LinkClient).items() if isinstance(row, _Remote)
}
