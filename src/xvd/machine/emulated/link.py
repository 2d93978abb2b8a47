# SPDX-License-Identifier: Apache-2.0
"""The same machine for several processes: the host's slow path over a unix socket.

A connection is a session: it ends when the socket closes, and so when the process dies, however it
dies. Requests and answers are JSON in one packet each, descriptors travel beside them. Mapping,
copying and notifying need no message: they happen in the shared memory that the descriptors name.

On the host's side every connection has a thread, because a call may only block its own client.
"""

import array
import asyncio
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

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
from xvd.machine.emulated.host import Host, Limits, Session
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
        self._host = host
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
        """One client, from its `open` to its end; what it held is given back then."""
        calls: _ClientCalls | None = None
        try:
            while True:
                data, fds = _receive(client)
                for fd in fds:
                    os.close(fd)
                if not data:
                    return
                request = msgspec.json.decode(data, type=Request)
                if calls is None:
                    calls = self._open(client, request)
                    if calls is None:
                        return
                else:
                    _send_away(client, *calls.answer(request))
        except (OSError, msgspec.MsgspecError):
            return  # a client that breaks off, or talks nonsense, is gone
        finally:
            if calls is not None:
                calls.session.close()
            self._clients.discard(client)
            client.close()

    def _open(self, client: socket.socket, request: Request) -> "_ClientCalls | None":
        try:
            calls = _ClientCalls(self, request)
        except GrantError as error:
            _send(client, Answer(error="grant", text=str(error), number=error.status), [])
        except XvdError as error:
            _send(client, Answer(error="config", text=str(error)), [])
        else:
            try:
                _send(client, Answer(calls.session.number), [])
            except OSError:
                calls.session.close()
                raise
            return calls
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


class _ClientCalls:
    """What one client may call; made by its first request, ``["open", [protocol, domid]]``."""

    def __init__(self, server: LinkServer, first: Request) -> None:
        if first.call != "open" or len(first.arguments) != 2 or first.arguments[0] != _PROTOCOL:
            raise ConfigError("the two ends of the machine socket are different versions of xvd")
        self.server = server
        self.session: Session = server._host.open(Domid(first.arguments[1]))

    def answer(self, request: Request) -> tuple[Answer, list[int]]:
        """Do a call: its answer, and the descriptors that go with it."""
        work = _CALLS.get(request.call)
        try:
            if work is None:
                raise ConfigError(f"the machine has no call {request.call!r}")
            return work(self, *request.arguments)
        except GrantError as error:
            return Answer(error="grant", text=str(error), number=error.status), []
        except EventChannelError as error:
            return Answer(error="evtchn", text=str(error), number=error.errno), []
        except DiskInUse as error:
            return Answer(error="busy", text=str(error)), []
        except (ConfigError, TypeError, ValueError, IndexError) as error:
            return Answer(error="config", text=str(error)), []

    def state(self, domid: int) -> tuple[Answer, list[int]]:
        memory_fd, heap_fd, limits = self.session.state(Domid(domid))
        numbers = [limits.pages, limits.grefs, limits.tracks, limits.ports]
        return Answer(numbers), [memory_fd, heap_fd]

    def share(self, peer: int, count: int) -> tuple[Answer, list[int]]:
        return Answer(self.session.share(Domid(peer), count)), []

    def unshare(self, frame: int) -> tuple[Answer, list[int]]:
        self.session.unshare(frame)
        return Answer(), []

    def alloc_unbound(self, peer: int) -> tuple[Answer, list[int]]:
        port, *fds = self.session.alloc_unbound(Domid(peer))
        return Answer(port), fds

    def bind_interdomain(self, peer: int, remote: int) -> tuple[Answer, list[int]]:
        port, *fds = self.session.bind_interdomain(Domid(peer), Port(remote))
        return Answer(port), fds

    def unbind(self, port: int) -> tuple[Answer, list[int]]:
        self.session.unbind(Port(port))
        return Answer(), []

    def claim(self, vdev: int) -> tuple[Answer, list[int]]:
        self.session.claim(vdev)
        return Answer(), []

    def disclaim(self, vdev: int) -> tuple[Answer, list[int]]:
        self.session.disclaim(vdev)
        return Answer(), []

    def create_domain(self, domid: int) -> tuple[Answer, list[int]]:
        self._toolstack_only()
        self.server._host.create_domain(Domid(domid))
        return Answer(), []

    def destroy_domain(self, domid: int) -> tuple[Answer, list[int]]:
        self._toolstack_only()
        self.server._host.destroy_domain(Domid(domid))
        return Answer(), []

    def books(self) -> tuple[Answer, list[int]]:
        self._toolstack_only()
        return Answer(self.server._host.books()), []

    def xenstore(self) -> tuple[Answer, list[int]]:
        return Answer(), [self.server.xenstore(self.session.domid).detach()]

    def _toolstack_only(self) -> None:
        if self.session.domid != 0:
            raise ConfigError("only domain 0 makes, ends and inspects domains")


_CALLS: dict[str, Callable[..., tuple[Answer, list[int]]]] = {
    name: getattr(_ClientCalls, name)
    for name in (
        "state", "share", "unshare", "alloc_unbound", "bind_interdomain", "unbind",
        "claim", "disclaim",
        "create_domain", "destroy_domain", "books", "xenstore",
    )
}  # fmt: skip


class LinkClient:
    """A session across the socket: `machine.Calls`. Any thread, one call at a time.

    Raises `PeerClosed` when the host is gone.
    """

    def __init__(self, path: str | os.PathLike[str], domid: Domid) -> None:
        self.domid = domid
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.connect(os.fspath(path))
        except OSError as error:
            self._socket.close()
            raise PeerClosed(
                f"{os.fspath(path)}: no host answers ({error.strerror}); start one: xvd host DIR"
            ) from None
        try:
            self.number: int = self._call("open", _PROTOCOL, domid)[0]
        except BaseException:
            self._socket.close()
            raise

    def _call(self, call: str, *arguments: int) -> tuple[Any, list[int]]:
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

    def state(self, domid: Domid) -> tuple[int, int, Limits]:
        """As `host.Session.state`."""
        numbers, fds = self._call("state", domid)
        return fds[0], fds[1], Limits(*numbers)

    def share(self, peer: Domid, count: int) -> tuple[int, list[Gref]]:
        """As `host.Session.share`."""
        frame, grefs = self._call("share", peer, count)[0]
        return frame, grefs

    def unshare(self, frame: int) -> None:
        """As `host.Session.unshare`."""
        self._call_if_alive("unshare", frame)

    def _channel(self, call: str, *arguments: int) -> tuple[Port, int, int]:
        port, fds = self._call(call, *arguments)
        return Port(port), fds[0], fds[1]

    def alloc_unbound(self, peer: Domid) -> tuple[Port, int, int]:
        """As `host.Session.alloc_unbound`."""
        return self._channel("alloc_unbound", peer)

    def bind_interdomain(self, peer: Domid, remote: Port) -> tuple[Port, int, int]:
        """As `host.Session.bind_interdomain`."""
        return self._channel("bind_interdomain", peer, remote)

    def unbind(self, port: Port) -> None:
        """As `host.Session.unbind`."""
        self._call_if_alive("unbind", port)

    def claim(self, vdev: int) -> None:
        """As `host.Session.claim`."""
        self._call("claim", vdev)

    def disclaim(self, vdev: int) -> None:
        """As `host.Session.disclaim`."""
        self._call_if_alive("disclaim", vdev)

    def _call_if_alive(self, call: str, *arguments: int) -> None:
        """A host that is gone has nothing left to be given back to."""
        try:
            self._call(call, *arguments)
        except PeerClosed:
            return

    def create_domain(self, domid: Domid) -> None:
        """Make a domain (dom0 only)."""
        self._call("create_domain", domid)

    def destroy_domain(self, domid: Domid) -> None:
        """End a domain (dom0 only)."""
        self._call("destroy_domain", domid)

    def books(self) -> dict[str, int]:
        """What is taken on the whole machine (dom0 only)."""
        return dict(self._call("books")[0])

    def xenstore(self) -> socket.socket:
        """A connected socket to the store under this domain's identity."""
        _, fds = self._call("xenstore")
        return socket.socket(fileno=fds[0])

    def close(self) -> None:
        """End the session."""
        self._socket.close()
