# SPDX-License-Identifier: Apache-2.0
"""The compiled transmission of one NBD client, stepped by hand: a socket at one end, a raw ring or
nothing at the other."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rig_front import FrontWorld

from xvd.blkif.messages import AnyRequest
from xvd.dataplane.front.clients import Clients
from xvd.dataplane.front.queue import FrontQueue
from xvd.dataplane.front.range_lock import RangeLock
from xvd.dataplane.front.waiting_room import WaitingRoom
from xvd.dataplane.types import StepFlag
from xvd.export import nbd_protocol as nbd
from xvd.export.memory import ExportMemory
from xvd.export.transmission import Transmission

READ, WRITE, DISC, FLUSH, TRIM = range(5)
SECTORS = 2048
WORKED = StepFlag.WORKED


@dataclass
class Asked:
    """A request that went the long way."""

    slot: int
    error: int
    command: int
    offset: int
    length: int
    payload: bytes | None


@dataclass
class Client:
    """A client's own end of the socket, and the transmission at the other."""

    socket: socket.socket
    transmission: Transmission
    news: int = 0
    asked: list[Asked] = field(default_factory=list)

    def send(
        self, command: int, offset: int = 0, length: int = 0, *, cookie: int = 7, flags: int = 0,
        payload: bytes = b"",
    ) -> None:  # fmt: skip
        magic = nbd.REQUEST_MAGIC
        self.socket.sendall(nbd.REQUEST.pack(magic, flags, command, cookie, offset, length))
        self.socket.sendall(payload)

    def received(self) -> bytes:
        """All that is there; empty after the end too."""
        data = b""
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while piece := self.socket.recv(1 << 20, socket.MSG_DONTWAIT):
                data += piece
        return data

    def listen(self) -> list[Asked]:
        """What the bell was rung for; the requests are kept in `asked` too."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.transmission.bell)
        news, requests = self.transmission.take()
        self.news |= news
        found = [
            Asked(slot, error, command, offset, length, payload)
            for slot, error, _, command, _, offset, length, payload in requests
        ]
        self.asked += found
        return found

    @property
    def left(self) -> bool:
        """Whether the transmission has come to its end."""
        self.listen()
        return bool(self.news & Transmission.LEFT)


def new_client(
    *, structured: bool = False, received: bytes = b"", bytes_max: int = 1 << 20
) -> Client:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    transmission = Transmission(
        theirs.detach(), structured=structured, requests_max=16, bytes_max=bytes_max,
        payload_max=1 << 20, memory=ExportMemory(1 << 30), received=received,
    )  # fmt: skip
    return Client(ours, transmission)


def settle(clients: Clients) -> None:
    """Step until nothing moves."""
    while clients.step() & WORKED:
        pass


def end(clients: Clients, client: Client, serve: Callable[[], object] = lambda: None) -> None:
    """The client goes; what it had asked for is answered, as often as there is more of it."""
    client.socket.close()
    for _ in range(1000):
        settle(clients)
        serve()
        if client.left:
            break
        for one in client.asked:
            with contextlib.suppress(ValueError):
                client.transmission.answer(one.slot, b"")
        client.asked.clear()
    assert client.left
    clients.forget(client.transmission)
    client.transmission.close()


def open_lock(*, sectors: int = SECTORS, block: int = 1, flushes: bool = True) -> RangeLock:
    lock = RangeLock()
    lock.allow(sectors=sectors, block_sectors=block, writable=True, flushes=flushes)
    return lock


class ClientWorld(FrontWorld):
    """A frontend's queue with clients, and the raw ring behind it."""

    lock: RangeLock
    front: FrontQueue
    clients: Clients

    def serve_clients(self, lock: RangeLock | None = None) -> Clients:
        """From here on the queue is stepped with its clients."""
        self.lock = lock or open_lock()
        self.front = self.queue
        self.clients = Clients(self.lock, self.queue)
        self.queue = self.clients  # type: ignore[assignment]
        return self.clients

    def on_ring(self) -> list[AnyRequest]:
        """Let everybody step; what is new on the ring."""
        found = self.requests()
        settle(self.clients)
        return found + self.requests()


@contextlib.contextmanager
def client_world(
    *, structured: bool = False, **options: int
) -> Iterator[tuple[ClientWorld, Client]]:
    """One client of one queue."""
    with ClientWorld(**options) as world:  # type: ignore[arg-type]
        clients = world.serve_clients()
        client = new_client(structured=structured)
        clients.join(client.transmission)
        yield world, client
        end(clients, client, world.serve)


@contextlib.contextmanager
def waiting_client(*, bytes_max: int = 1 << 20) -> Iterator[tuple[Clients, Client]]:
    """One client where there is no queue."""
    room = WaitingRoom(open_lock())
    client = new_client(bytes_max=bytes_max)
    room.join(client.transmission)
    yield room, client
    end(room, client)
