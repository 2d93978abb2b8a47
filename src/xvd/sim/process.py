# SPDX-License-Identifier: Apache-2.0
"""A process of the simulated machine: an event loop, a machine, connections to the store, and what
it would have threads for.

It is a `Runtime`: queues and calls of its own are steps that the scheduler takes.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from xvd.dataplane.back.queue import BackendQueue
from xvd.dataplane.loop.stepped import Stepped
from xvd.dataplane.loop.thread import LoopOptions, Queue
from xvd.dataplane.types import HasPorts, StepFlag
from xvd.machine.emulated.host import Host
from xvd.machine.emulated.machine import EmulatedMachine
from xvd.machine.emulated.xenstore import XenstoreStore
from xvd.machine.xs.client import XenstoreClient
from xvd.sim.clock import Clock
from xvd.sim.eventloop import VirtualLoop
from xvd.sim.store import StoreLink
from xvd.types import Domid
from xvd.xenbus.runner import OnExit, Runner

_T = TypeVar("_T")
_WORKED, _DRAINED = StepFlag.WORKED, StepFlag.DRAINED
_MOVED = StepFlag.WORKED | StepFlag.EXCHANGED | StepFlag.LEFT
_ROUNDS_MAX, _CANCELS_MAX = 1000, 10


class SteppedRunner:
    """A queue that the scheduler steps in the place of a thread; a `Runner`."""

    def __init__(
        self, process: "Process", queue: Queue, name: str, on_exit: OnExit, options: LoopOptions
    ) -> None:
        self.name = name
        self.awake = True
        self.due_ns = 0
        self._process = process
        self._queue = queue
        self._stepped = Stepped(queue)
        self._on_exit = on_exit
        self._watchdog_ns = int(options.watchdog_s * 1e9)
        self._leaving = False

    def wake(self) -> None:
        """See `Runner.wake`."""
        self.awake = True

    def replace(self, queue: HasPorts) -> None:
        """See `Runner.replace`."""
        self._stepped = Stepped(queue)
        self.wake()

    def drain(self) -> None:
        """See `Runner.drain`."""
        self._queue.stop()
        self.wake()

    def abandon(self) -> None:
        """See `Runner.abandon`."""
        self._leaving = True
        self.wake()

    def counters(self) -> dict[str, int]:
        """It has no thread that sleeps."""
        return {}

    @property
    def has_event(self) -> bool:
        """Whether an event is under way to it."""
        return self._stepped.has_event

    def take_event(self) -> None:
        """The event arrives."""
        self._stepped.take_event()

    def step(self, budget: int) -> int:
        """One step, then sleep if there is nothing to do; `step_flag`s."""
        now_ns = self._process.clock.now_ns
        if self._leaving:
            self._end()
            return _DRAINED
        if isinstance(self._queue, BackendQueue):
            self._queue.set_time(now_ns)
        flags = self._stepped.step(budget)
        if flags & _DRAINED:
            self._end()
            return flags
        if flags & StepFlag.LEFT:
            self._process.has_left(self._queue)
        self.awake = bool(flags & _MOVED) or not self._stepped.may_sleep()
        self.due_ns = min(filter(None, (now_ns + self._watchdog_ns, self._stepped.due_ns)))
        return flags

    def _end(self) -> None:
        self._process.runners.remove(self)
        self.tell_end()

    def tell_end(self) -> None:
        """Tell who waits for it that it runs no more."""
        self._process.loop.call_soon(self._on_exit, None)


class Process:
    """One process of a domain. For the scheduler, which is the only thread."""

    def __init__(self, host: Host, store: XenstoreStore, clock: Clock, domid: Domid) -> None:
        self.clock = clock
        self.loop = VirtualLoop(clock)
        self.machine = EmulatedMachine(host.open(domid), self._connect)
        self.links: list[StoreLink] = []
        self.runners: list[SteppedRunner] = []
        self.calls: list[Callable[[], None]] = []
        self.alive = True
        self._left: list[SteppedRunner] = []
        self._dead: set[asyncio.Task[Any]] = set()
        """Tasks that the collector may not unwind before `bury`: the dead change no file."""
        self.connections = 0
        self._store = store
        self._domid = domid

    async def _connect(self) -> XenstoreClient:
        link = StoreLink(self._store, self._domid, self.clock)
        self.links.append(link)
        return await link.open()

    def spawn(self, work: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
        """Let it do something."""
        return self.loop.create_task(work)

    # ---- Runtime ----

    def run(self, queue: Queue, name: str, on_exit: OnExit, options: LoopOptions) -> Runner:
        """See `Runtime.run`."""
        self.runners.append(SteppedRunner(self, queue, name, on_exit, options))
        return self.runners[-1]

    async def call(self, work: Callable[..., _T], *arguments: object) -> _T:
        """See `Runtime.call`: the scheduler does it, sooner or later."""
        outcome: asyncio.Future[_T] = self.loop.create_future()

        def do() -> None:
            try:
                result = work(*arguments)
            except Exception as error:
                if not outcome.done():
                    outcome.set_exception(error)
            else:
                if not outcome.done():
                    outcome.set_result(result)

        self.calls.append(do)
        return await outcome

    def has_left(self, queue: Queue) -> None:
        """A queue of its has left its ring, and its storage what that had."""

    # ---- The end ----

    def kill(self) -> None:
        """Die as by SIGKILL: nothing of it runs any more, and the system takes back what it had.

        The queues are to be abandoned before.
        """
        self.alive = False
        self._dead = asyncio.all_tasks(self.loop)
        for link in self.links:
            link.cut()
        self._left, self.runners = self.runners, []
        self.calls.clear()
        self.machine.close()

    def bury(self) -> None:
        """Let what is left of a dead process's tasks unwind, when nothing it did can matter.

        What waits while it unwinds, for somebody who is dead too, is cancelled again: a coroutine
        that the collector finds waiting complains of its end on stderr.
        """
        for runner in self._left:
            runner.tell_end()
        for _ in range(_CANCELS_MAX):
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self._unwind()
        self.loop.close()

    def _unwind(self) -> None:
        for _ in range(_ROUNDS_MAX):
            if not asyncio.all_tasks(self.loop):
                return
            while self.calls:
                self.calls.pop()()
            if not self.loop.ready:
                if self.loop.due_ns is None:
                    return
                self.clock.jump(self.loop.due_ns)
            self.loop.round()
            for runner in list(self.runners):
                runner.abandon()
                runner.step(1)
