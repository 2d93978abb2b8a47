# SPDX-License-Identifier: Apache-2.0
"""All queues of a connection, of either end: they begin together and end together.

They share the storage or the disk and nothing else; each has a runner, counters and, at the
backend, a journal of its own (Linux 2fb1ef4f, d4bf0065).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, TypeVar

from xvd.dataplane.loop.thread import Queue
from xvd.xenbus.link import BackLink, FrontLink
from xvd.xenbus.runner import LoopOptions, Runtime

_L = TypeVar("_L", BackLink, FrontLink)


class Links(Generic[_L]):
    """The links of one connection, in the order of the queues. For the event loop's thread.

    `failure`: why they run no more, in words; empty for one that was drained or abandoned.
    """

    def __init__(self) -> None:
        self.links: list[_L] = []
        self.failure = ""
        self._on_exit: Callable[[], None] = _tell_nobody

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
        for number, (link, queue) in enumerate(zip(self.links, queues, strict=False)):
            its_name = f"{name}-{number}" if len(self.links) > 1 else name
            try:
                link.runner = runtime.run(queue, its_name, partial(self._ended, link), options)
            except OSError as error:
                if number == 0:
                    raise
                self.failure = str(error)
                self.give_up()
                return

    def _ended(self, link: _L, failure: Exception | None) -> None:
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

    def release(self) -> None:
        """Give everything back; only when nothing runs. Idempotent."""
        while self.links:
            self.links.pop().release()
        # Who is told knows us: without this our descriptors would wait for the collector.
        self._on_exit = _tell_nobody


def _tell_nobody() -> None:
    """Do nothing: nobody waits for the end."""
