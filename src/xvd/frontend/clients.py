# SPDX-License-Identifier: Apache-2.0
"""A disk's clients: in the threads of its queues while there are any, else in the event loop.

A client is compiled (dataplane/front/clients.pyx): it takes its requests off a descriptor, and the
thread of one of the queues steps it. Before a queue's first client comes, its thread steps nothing
but the queue. When the disk changes its backend, its clients wait in a room that the event loop
steps, and go on to the next queues with everything they have under way.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator

from xvd.blkif.features import BackendFeatures
from xvd.dataplane.front.clients import Clients, ClientSet
from xvd.dataplane.front.range_lock import RangeLock
from xvd.dataplane.front.waiting_room import WaitingRoom
from xvd.dataplane.types import HasPorts, StepFlag, Wish
from xvd.frontend.connection import Connection
from xvd.types import RING_SECTOR_SIZE


class DiskClients:
    """The clients of one disk. Everything in the event loop's thread."""

    def __init__(self) -> None:
        self._lock = RangeLock()
        self._room = WaitingRoom(self._lock)
        self._queues: dict[int, Clients] = {}
        self._connection: Connection | None = None
        self._where: dict[HasPorts, ClientSet] = {}
        self._watched: dict[int, int] = {}
        self._stepping = False
        self._holds = 0
        self._write_ended: asyncio.Future[None] | None = None

    # ---- Connections ----

    def connected(self, connection: Connection) -> None:
        """The queues run: everybody goes there."""
        self._connection = connection
        for client in self._room.take_back():
            self._join(client)
        self._watch()

    def disconnected(self) -> None:
        """Take the clients from queues that have ended and that nothing steps any more."""
        self._connection = None
        for queue in self._queues.values():
            for client in queue.take_back():
                self._where[client] = self._room
                self._room.join(client)
        self._queues.clear()
        self._step_soon()

    def ended(self) -> None:
        """Send what is under way to the disk, which fails it: there will be no queue again."""
        self._room.give_up()
        self._step_soon()

    def allow(self, features: BackendFeatures, *, writable: bool, flushes: bool) -> None:
        """Set what clients may ask a queue for."""
        self._lock.allow(
            sectors=features.sectors,
            block_sectors=features.sector_size // RING_SECTOR_SIZE,
            writable=writable,
            flushes=flushes,
        )

    # ---- Clients ----

    def attach(self, client: HasPorts) -> None:
        """Step a client from now on, until it has left and is detached."""
        if self._connection is None:
            self._where[client] = self._room
            self._room.join(client)
            self._step_soon()
        else:
            self._join(client)

    def detach(self, client: HasPorts) -> None:
        """Release a client that has left."""
        where = self._where.pop(client, None)
        if where is not None:
            where.forget(client)

    def wake(self, client: HasPorts) -> None:
        """Let a client be stepped: somebody has something for it."""
        where = self._where.get(client)
        if where is self._room:
            self._step_soon()
        elif self._connection is not None:
            for number, queue in self._queues.items():
                if queue is where:
                    self._connection.wake(number)

    def _join(self, client: HasPorts) -> None:
        """Add a client to the queue that has the fewest: it belongs to one queue."""
        assert self._connection is not None
        numbers = range(len(self._connection.queues))
        queue = self._clients_of(min(numbers, key=lambda it: len(self._queues.get(it, ()))))
        self._where[client] = queue
        queue.join(client)
        self.wake(client)

    def _clients_of(self, number: int) -> Clients:
        """Return a queue's clients, which from now on are stepped in its place."""
        assert self._connection is not None
        if number not in self._queues:
            queue = Clients(self._lock, self._connection.queues[number])
            self._queues[number] = queue
            self._connection.replace(number, queue)
        return self._queues[number]

    # ---- The room ----

    def _step_soon(self) -> None:
        if not self._stepping:
            self._stepping = True
            asyncio.get_running_loop().call_soon(self._step)

    def _step(self) -> None:
        """Step one round; the event loop's other work runs before the next."""
        self._stepping = False
        if self._room.step() & StepFlag.WORKED:
            self._step_soon()
        self._watch()

    def _watch(self) -> None:
        """Listen for what the clients in the room wish, and for nobody else."""
        events = asyncio.get_running_loop()
        wished = dict(self._room.wishes())
        for fd in self._watched.keys() | wished.keys():
            before, now = self._watched.get(fd, 0), wished.get(fd, 0)
            if before & ~now & Wish.READS:
                events.remove_reader(fd)
            if before & ~now & Wish.WRITES:
                events.remove_writer(fd)
            if now & ~before & Wish.READS:
                events.add_reader(fd, self._step_soon)
            if now & ~before & Wish.WRITES:
                events.add_writer(fd, self._step_soon)
        self._watched = wished

    # ---- Parts of blocks ----

    @contextlib.asynccontextmanager
    async def kept_off(self, first: int, end: int) -> AsyncIterator[None]:
        """No client's write on the sectors from `first` to before `end` is under way meanwhile.

        Those that come go the long way, by the disk, and wait there.
        """
        token = self._lock.hold(first, end)
        self._holds += 1
        try:
            while self._lock.busy(token):
                await self._until_a_write_ends()
            yield
        finally:
            self._holds -= 1
            if self._holds == 0 and self._write_ended is not None:
                self._rung()  # whoever listened has gone, and the bell goes too
            self._lock.release(token)

    async def _until_a_write_ends(self) -> None:
        events = asyncio.get_running_loop()
        if self._write_ended is None:
            self._write_ended = events.create_future()
            events.add_reader(self._lock.fd, self._rung)
        await asyncio.shield(self._write_ended)

    def _rung(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._lock.fd)
        asyncio.get_running_loop().remove_reader(self._lock.fd)
        assert self._write_ended is not None
        if not self._write_ended.done():
            self._write_ended.set_result(None)
        self._write_ended = None
