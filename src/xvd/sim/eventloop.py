# SPDX-License-Identifier: Apache-2.0
"""An asyncio event loop in virtual time, of which the scheduler runs one round after another.

It never waits: when nothing is ready the scheduler moves the clock. A process that is killed has
its loop run no more, in the middle of whatever its tasks were doing.
"""

import asyncio
import selectors
from typing import Any

from xvd.sim.clock import Clock

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
