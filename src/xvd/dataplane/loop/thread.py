# SPDX-License-Identifier: Apache-2.0
"""A queue's native thread, as the control plane holds it."""

import asyncio
import dataclasses
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from xvd.dataplane.loop.loop import Loop
from xvd.dataplane.types import HasPorts

BUDGET = 8
"""Requests of one step, where grants stay mapped: few, so that both ends work at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopOptions:
    """How a queue is run. poll_s: for how long at most one looks for more before one sleeps,
    seconds; None: as long as a sleep costs here. holdoff_s: how long one sleeps after work without
    asking for an event, seconds; then one does not look. watchdog_s: the longest sleep after
    something was done. budget: most requests of one step."""

    poll_s: float | None = None
    holdoff_s: float = 0.0
    watchdog_s: float = 5.0
    budget: int = BUDGET


class Queue(Protocol):
    """What both kinds of queue can do for their thread."""

    @property
    def ports(self) -> object:
        """Capsule ``xvd.stepper_ports``."""

    def stop(self) -> None:
        """Begin nothing new."""


class QueueThread:
    """Runs a queue until it is drained or broken, then calls `on_exit` in the event loop's thread.

    `on_exit` gets the exception that ended the loop, or None. options: see `Loop`. Made and used in
    the event loop's thread.
    """

    def __init__(
        self,
        queue: Queue,
        name: str,
        on_exit: Callable[[Exception | None], None],
        *,
        options: LoopOptions,
    ) -> None:
        self._queue = queue
        self._on_exit = on_exit
        self._events = asyncio.get_running_loop()
        self.loop = Loop(queue, **dataclasses.asdict(options))
        self.wake = self.loop.wake
        """Let the queue be stepped now. Any thread."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        failure: Exception | None = None
        try:
            self.loop.run()
        except OSError as error:
            failure = error
        try:
            self._events.call_soon_threadsafe(self._exited, failure)
        except RuntimeError:
            return  # the event loop was closed first: nobody is left to be told

    def _exited(self, failure: Exception | None) -> None:
        self._thread.join()
        self._on_exit(failure)

    def replace(self, queue: HasPorts) -> None:
        """Step this in the queue's place from now on, which steps the queue in turn."""
        self.loop.replace(queue)

    def drain(self) -> None:
        """Finish what is in flight and nothing more; ends in `on_exit`."""
        self._queue.stop()
        self.loop.wake()

    def counters(self) -> dict[str, int]:
        """See `Loop.counters`."""
        return self.loop.counters()

    def abandon(self) -> None:
        """Leave at once, whatever is in flight; ends in `on_exit`."""
        self.loop.leave()
