# SPDX-License-Identifier: Apache-2.0
"""A process's connection to xenstore: the shipped client and the shipped store, and between them
messages that the scheduler delivers, late or not at all."""

import asyncio
from collections import deque

from xvd.machine.emulated.xenstore import XenstoreStore
from xvd.machine.xs.client import XenstoreClient
from xvd.machine.xs.messages import Framer, Message, MessageType
from xvd.sim.clock import Clock
from xvd.types import Domid


class StoreLink:
    """The client's `Reader` and `Writer`, of one connection. Its messages keep their order."""

    def __init__(self, store: XenstoreStore, domid: Domid, clock: Clock) -> None:
        self._clock = clock
        self._connection = store.connect(domid, self._answer, self.cut)
        self._framer = Framer()
        self._requests: deque[tuple[int, Message]] = deque()
        self._answers: deque[tuple[int, bytes]] = deque()
        self._arrived = bytearray()
        self._wakeup = asyncio.Event()
        self._open = True
        self.delay_ns = 0
        """How long what is sent from now on is under way, either way."""
        self.conflicts = 0
        """Commits to answer with EAGAIN from now on."""

    async def open(self) -> XenstoreClient:
        """The client on it."""
        return XenstoreClient(self, self)

    # ---- What the client sees ----

    async def read(self, n: int, /) -> bytes:
        """See `machine.xs.client.Reader`."""
        while not self._arrived and self._open:
            self._wakeup.clear()
            await self._wakeup.wait()
        part = bytes(self._arrived[:n])
        del self._arrived[:n]
        return part

    def write(self, data: bytes, /) -> None:
        """See `machine.xs.client.Writer`."""
        if not self._open:
            return  # `drain` tells
        self._framer.feed(data)
        while (message := self._framer.next_message()) is not None:
            self._requests.append((self._clock.now_ns + self.delay_ns, message))

    async def drain(self) -> None:
        """There is always room."""
        if not self._open:
            raise ConnectionResetError

    def close(self) -> None:
        """The client goes."""
        self.cut()

    async def wait_closed(self) -> None:
        """It is closed at once."""

    # ---- What the scheduler does ----

    @property
    def due_ns(self) -> int | None:
        """When the next message arrives, at either end; None if none is under way."""
        first = [queue[0][0] for queue in (self._requests, self._answers) if queue]
        return min(first, default=None)

    def deliver(self) -> str:
        """Let the message that is due arrive; what happened, for the trace."""
        request = self._requests and self._requests[0][0] <= self._clock.now_ns
        if request:
            message = self._requests.popleft()[1]
            if self.conflicts and message.type == MessageType.TRANSACTION_END:
                self.conflicts -= 1
                self._refuse(message)
                return "conflict"
            self._connection.handle(message)
            return f"request {message.type}"
        self._arrived += self._answers.popleft()[1]
        self._wakeup.set()
        return "answer"

    def _refuse(self, end: Message) -> None:
        """As a store does that has seen another change the same nodes: nothing of it is done."""
        if end.payload.startswith(b"T"):
            self._connection.handle(Message(end.type, end.req_id, end.tx_id, b"F\0"))
            self._answers.pop()
            self._answer(Message(MessageType.ERROR, end.req_id, end.tx_id, b"EAGAIN\0"))
        else:
            self._connection.handle(end)

    def _answer(self, message: Message) -> None:
        if self._open:
            self._answers.append((self._clock.now_ns + self.delay_ns, message.pack()))

    def cut(self) -> None:
        """The connection is lost: what is under way with it."""
        if self._open:
            self._open = False
            self._connection.close()
            self._requests.clear()
            self._answers.clear()
            self._wakeup.set()
