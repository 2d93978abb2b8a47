# SPDX-License-Identifier: Apache-2.0
"""The queues of a connection, of either end: each a link, and all of them together.

A link is a ring, an event channel, the queue, and what runs it. It comes about as a handshake does,
in two steps: the ring and the event channel first, then the queue, when the peer's nodes say what
it is to be. It gives back what it took in the opposite order. Everybody who has both ends of a ring
has them by these: the two drivers, the benchmarks, and the tests.

The links of a connection begin together and end together. They share the storage or the disk and
nothing else; each has a runner, counters and, at the backend, a journal of its own (Linux 2fb1ef4f,
d4bf0065).
"""

import asyncio
import contextlib
import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

from xvd.blkif.abi import Abi, nr_ents
from xvd.blkif.nodes import QueueConfig
from xvd.dataplane.back.options import BackOptions
from xvd.dataplane.back.queue import BackendQueue
from xvd.dataplane.front.options import FrontOptions
from xvd.dataplane.front.queue import FrontQueue
from xvd.dataplane.loop.thread import LoopOptions, Queue
from xvd.dataplane.ring.ring import FrontRing
from xvd.dataplane.types import HasPorts
from xvd.machine.interface import EventChannel, Machine, SharedPages
from xvd.types import Domid
from xvd.xenbus.runner import THREADS, Runner, Runtime

_Q = TypeVar("_Q", BackendQueue, FrontQueue)


class Link(ABC, Generic[_Q]):
    """What the two ends' links have in common. `release` is due, whatever `prepare` raises."""

    channel: EventChannel
    runner: Runner | None = None
    """What runs the queue, while something does."""

    def __init__(self, abi: Abi, ring_pages: int) -> None:
        self.abi = abi
        self.entries = nr_ents(ring_pages, abi)
        self._queue: _Q | None = None
        self._undo = contextlib.ExitStack()

    @property
    def queue(self) -> _Q:
        """The queue; there since `prepare`."""
        assert self._queue is not None
        return self._queue

    def own(self, give_back: Callable[[], None]) -> None:
        """Have this called by `release`, before what was taken earlier is given back."""
        self._undo.callback(give_back)

    def release(self) -> None:
        """Give everything back; only when nothing runs the queue. Idempotent."""
        self._undo.close()

    @property
    def has_left(self) -> bool:
        """Whether the queue has left the ring, and has no successor yet."""
        return False

    @property
    @abstractmethod
    def fault(self) -> str:
        """The peer's deed that no connection survives, in words; mostly empty."""


class BackLink(Link[BackendQueue]):
    """A ring that `peer` has granted, mapped, and its event channel, bound.

    nodes: where they are, as the frontend has published. Raises `GrantError` or
    `EventChannelError`, holding nothing.
    """

    def __init__(self, machine: Machine, peer: Domid, nodes: QueueConfig, abi: Abi) -> None:
        super().__init__(abi, len(nodes.ring_refs))
        with contextlib.ExitStack() as undo:
            self.grants = machine.grants.foreign(peer)
            undo.callback(self.grants.close)
            self.ring = self.grants.map(nodes.ring_refs)
            undo.callback(self.ring.close)
            channels = machine.event_channels
            self.channel = channels.bind_interdomain(peer, nodes.event_channel)
            undo.callback(self.channel.close)
            self._undo = undo.pop_all()

    @property
    def fault(self) -> str:
        """See `Link.fault`."""
        return "the frontend broke the ring: indices out of bounds" if self.queue.broken else ""

    @property
    def has_left(self) -> bool:
        """See `Link.has_left`."""
        return self.queue.has_left

    def prepare(
        self,
        storage: HasPorts,
        options: BackOptions,
        journal: bytearray | mmap.mmap | None = None,
        *,
        resume: bool = False,
    ) -> BackendQueue:
        """Make the queue, or its successor. See `BackendQueue`."""
        self._queue = queue = BackendQueue(
            self.ring.view, self.entries, self.abi.number, self.grants, self.channel, storage,
            options, journal=journal, resume=resume,
        )  # fmt: skip
        self.own(queue.release)
        return queue


class FrontLink(Link[FrontQueue]):
    """A ring of our own pages, granted to `peer`, and an event channel to which it may bind.

    Raises `GrantError` or `EventChannelError`, holding nothing.
    """

    def __init__(self, machine: Machine, peer: Domid, ring_pages: int, abi: Abi) -> None:
        super().__init__(abi, ring_pages)
        with contextlib.ExitStack() as undo:
            self.ring = machine.grants.share(peer, ring_pages)
            undo.callback(self.ring.close)
            FrontRing(self.ring.view, self.entries, abi.number, stride=self.ring.stride).init()
            self.channel = machine.event_channels.alloc_unbound(peer)
            undo.callback(self.channel.close)
            self._undo = undo.pop_all()

    @property
    def fault(self) -> str:
        """See `Link.fault`."""
        return self.queue.breach or ""

    @property
    def nodes(self) -> QueueConfig:
        """Return what is to be published of it."""
        return QueueConfig(tuple(self.ring.grefs), self.channel.port)

    def prepare(self, pages: SharedPages, options: FrontOptions) -> FrontQueue:
        """Make the queue. The pages stay the caller's, or the link's that `own`s them."""
        self._queue = queue = FrontQueue(
            self.ring.view, self.entries, self.abi.number, pages, self.channel, options
        )
        return queue


# ---- All of a connection -----------------------------------------------------------------------

_L = TypeVar("_L", BackLink, FrontLink)


class Links(Generic[_L]):
    """The links of one connection, in the order of the queues. For the event loop's thread.

    `failure`: why they run no more, in words; empty for one that was drained or abandoned.
    """

    def __init__(self) -> None:
        self.links: list[_L] = []
        self.failure = ""
        self._on_exit: Callable[[], None] = _tell_nobody
        self._is_draining = False
        self._name = ""
        self._runtime: Runtime = THREADS
        self._options = LoopOptions()
        self._leavers: dict[Any, asyncio.Future[None]] = {}

    def start(
        self,
        queues: Sequence[Queue],
        name: str,
        runtime: Runtime,
        options: LoopOptions,
        on_exit: Callable[[], None],
    ) -> None:
        """Run `queues`, one for each of the first links; `on_exit` is called when all have ended.

        A queue that breaks takes the others with it: a disk of which a part hangs is of no use.
        So does one that cannot be run; OSError is raised where that is the first, and none runs.
        """
        self._on_exit = on_exit
        self._name, self._runtime, self._options = name, runtime, options
        for number, (link, queue) in enumerate(zip(self.links, queues, strict=False)):
            try:
                link.runner = self._run(number, queue)
            except OSError as error:
                if number == 0:
                    raise
                self.failure = str(error)
                self.give_up()
                return

    def _run(self, number: int, queue: Queue) -> Runner:
        name = f"{self._name}-{number}" if len(self.links) > 1 else self._name
        ended = partial(self._ended, self.links[number], queue)
        return self._runtime.run(queue, name, ended, self._options)

    def leaves(self, queue: Queue) -> asyncio.Future[None]:
        """Expect a queue to leave its ring, which is not the end of its link; done when it has
        ended. `succeed` is due, or `end_left`."""
        self._leavers[queue] = asyncio.get_running_loop().create_future()
        return self._leavers[queue]

    def succeed(self, number: int, queue: Queue) -> None:
        """Run this in the place of one that has left its ring. Raises OSError if that cannot be."""
        self.links[number].runner = None
        self.links[number].runner = runner = self._run(number, queue)
        if self._is_draining:
            runner.drain()

    def end_left(self, why: str = "") -> None:
        """End all: of those that have left their rings some have no successor."""
        self.failure = self.failure or why
        for link in self.links:
            if link.has_left:
                link.runner = None
        if self.running:
            self.give_up()
        else:
            self._on_exit()

    def _ended(self, link: _L, queue: Queue, failure: Exception | None) -> None:
        if (left := self._leavers.pop(queue, None)) is not None:
            left.set_result(None)
            if link.queue is not queue or link.has_left:
                return
        link.runner = None
        why = link.fault or ("" if failure is None else str(failure))
        self.failure = self.failure or why
        if not self.running:
            self._on_exit()
        elif why:
            self.give_up()

    @property
    def running(self) -> bool:
        """Whether a queue is still run."""
        return any(link.runner for link in self.links)

    def give_up(self) -> None:
        """End the other queues: one is broken."""
        self.drain()

    def drain(self) -> None:
        """Finish what is in flight on every ring and nothing more; ends in `on_exit`."""
        self._is_draining = True
        for link in self.links:
            if link.runner is not None:
                link.runner.drain()

    def abandon(self) -> None:
        """Leave at once, whatever is in flight; ends in `on_exit`."""
        for link in self.links:
            if link.runner is not None:
                link.runner.abandon()

    def wake(self, number: int) -> None:
        """Let a queue be stepped now."""
        if (runner := self.links[number].runner) is not None:
            runner.wake()

    def wake_all(self) -> None:
        """Let every queue be stepped now."""
        for number in range(len(self.links)):
            self.wake(number)

    def replace(self, number: int, queue: HasPorts) -> None:
        """Step this in the place of one queue, if that is still run: see `Runner.replace`."""
        if (runner := self.links[number].runner) is not None:
            runner.replace(queue)

    def release(self) -> None:
        """Give everything back; only when nothing runs. Idempotent."""
        while self.links:
            self.links.pop().release()
        # Who is told knows us: without this our descriptors would wait for the collector.
        self._on_exit = _tell_nobody


def _tell_nobody() -> None:
    """Do nothing: nobody waits for the end."""
