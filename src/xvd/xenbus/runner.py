# SPDX-License-Identifier: Apache-2.0
"""What an end leaves to its process: that its queues run, and calls that may never return.

Here each has a thread of its own. Whoever moves the time himself has steps in the place of threads.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol, TypeVar

from xvd.dataplane.loop.thread import LoopOptions, Queue, QueueThread
from xvd.dataplane.loop.waiting import sleep_cost_s
from xvd.dataplane.types import HasPorts

_T = TypeVar("_T")

OnExit = Callable[[Exception | None], None]
"""Called in the event loop's thread when a queue runs no more, with what ended it, if anything."""


def measure_waiting() -> None:
    """Find out what a sleep costs here, which whoever runs a queue does else: processes that are
    forked from this one then know it."""
    sleep_cost_s()


class Runner(Protocol):
    """What runs one queue until it is drained, abandoned or broken."""

    def wake(self) -> None:
        """Let the queue be stepped now. Any thread."""

    def replace(self, queue: HasPorts) -> None:
        """Step this in the queue's place from now on, which steps the queue in turn."""

    def drain(self) -> None:
        """Finish what is in flight and nothing more."""

    def abandon(self) -> None:
        """Leave at once, whatever is in flight."""

    def counters(self) -> dict[str, int]:
        """How often it slept and was woken, by name."""


class Runtime(Protocol):
    """Who runs queues and calls. For the event loop's thread."""

    def run(self, queue: Queue, name: str, on_exit: OnExit, options: LoopOptions) -> Runner:
        """Run a queue from now on. Raises OSError if it cannot be had."""

    async def call(self, work: Callable[..., _T], *arguments: object) -> _T:
        """Call `work` and return what it returns, which may take for ever. Cancelling gives up the
        waiting, not the call."""


async def in_own_thread(call: Callable[..., _T], *arguments: object) -> _T:
    """Call it in a new thread and wait for what it returns or raises.

    A pool of threads is bounded: a few calls that hang, as of storage behind a dead server, would
    keep all others waiting, whatever storage those are for. A thread for each costs some 50 us, for
    what happens at most a few times in a disk's life. None of them keeps the process from ending.

    Cancelling gives the waiting up, not the call: what it returns then is dropped.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[_T] = loop.create_future()

    def tell(result: _T | None, error: BaseException | None) -> None:
        if outcome.done():
            return
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(result)  # type: ignore[arg-type]

    def work() -> None:
        try:
            told: tuple[_T | None, BaseException | None] = (call(*arguments), None)
        except BaseException as error:  # also what ends a thread: the waiting one has to know
            told = (None, error)
        try:
            loop.call_soon_threadsafe(tell, *told)
        except RuntimeError:
            return  # the loop has ended: nobody waits

    thread = threading.Thread(target=work, name="xvd-storage", daemon=True)
    thread.start()
    try:
        return await outcome
    finally:
        if not outcome.cancelled():
            thread.join()  # it has told us, and has nothing more to do


_LEFT_ALONE: "Final[set[asyncio.Future[None]]]" = set()


def leave_alone(wait: Coroutine[Any, Any, None] | asyncio.Future[None]) -> None:
    """Let a wait for storage go on that may never answer, and that nobody waits for."""
    future = asyncio.ensure_future(wait)
    _LEFT_ALONE.add(future)
    future.add_done_callback(_LEFT_ALONE.discard)


class Threads:
    """A thread for each queue and each call."""

    def run(self, queue: Queue, name: str, on_exit: OnExit, options: LoopOptions) -> Runner:
        """See `Runtime.run`. `name` is the thread's."""
        return QueueThread(queue, name, on_exit, options=options)

    async def call(self, work: Callable[..., _T], *arguments: object) -> _T:
        """See `Runtime.call`."""
        return await in_own_thread(work, *arguments)


THREADS = Threads()


class InTurn:
    """One at a time of such calls, as one storage wants them; `lock` is for other threads' own."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.lock = threading.Lock()

    async def call(self, call: Callable[..., _T], *arguments: object) -> _T:
        """Do it in a thread of its own, and with nobody else at the storage."""

        def alone() -> _T:
            with self.lock:
                return call(*arguments)

        return await self._runtime.call(alone)
