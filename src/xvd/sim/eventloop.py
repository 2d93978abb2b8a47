# SPDX-License-Identifier: Apache-2.0
"""An asyncio event loop in virtual time, of which the scheduler runs one round after another.

It never waits: when nothing is ready the scheduler moves the clock. A process that is killed has
its loop run no more, in the middle of whatever its tasks were doing.
"""

import asyncio
import selectors
from collections.abc import Callable
from contextvars import Context
from typing import Any, TypeVarTuple

from xvd.loglimit import LogLimit
from xvd.sim.clock import Clock

_Ts = TypeVarTuple("_Ts")

_NS = 1_000_000_000


class _NeverWaits(selectors.EpollSelector):
    def select(self, timeout: float | None = None) -> list[Any]:  # noqa: ARG002
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """One process's event loop. It reads two of asyncio's own queues, to see what is ready."""

    _ready: Any
    _scheduled: Any

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._files = _NeverWaits()
        super().__init__(self._files)
        self.failures: list[BaseException] = []
        """What tasks raised that nobody awaited."""
        self.set_exception_handler(self._note)

    def _note(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if (error := context.get("exception")) is not None:
            self.failures.append(error)

    def time(self) -> float:
        """Virtual seconds."""
        return self._clock.now_ns / _NS

    def call_later(
        self,
        delay: float,
        callback: Callable[[*_Ts], object],
        *args: *_Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Call it later; but for a line of the log that tells of others. Whether there is one is up
        to the log's level and to real time, neither of which may change a run."""
        if getattr(callback, "__func__", None) is LogLimit.tell:
            return asyncio.TimerHandle(self.time() + delay, callback, args, self, context)
        return super().call_later(delay, callback, *args, context=context)

    @property
    def due_ns(self) -> int | None:
        """When its next timer ends; None if there is none."""
        timers = [timer.when() for timer in self._scheduled if not timer.cancelled()]
        return int(min(timers) * _NS) + 1 if timers else None

    @property
    def ready(self) -> bool:
        """Whether a round would do something now."""
        due = self.due_ns
        if self._ready or (due is not None and due <= self._clock.now_ns):
            return True
        return bool(self._files.select())

    def round(self) -> None:
        """Run what is ready, and nothing that becomes ready meanwhile."""
        self.call_soon(self.stop)
        self.run_forever()
