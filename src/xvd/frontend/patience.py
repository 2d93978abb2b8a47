# SPDX-License-Identifier: Apache-2.0
"""How long a backend may owe answers and give none.

A backend whose driver was taken away under it leaves its state at Connected, and nothing else tells
that nobody serves the ring any more: xen-blkfront waits for ever then.
"""

import asyncio
from collections.abc import Callable
from typing import Final

POLLS: Final = 4
"""Polls in one term: what is found silent was silent for the term, or up to a quarter longer."""


class Deadline:
    """Calls `due` once, so many seconds after `start`, unless stopped before."""

    def __init__(self, seconds: float, due: Callable[[], None]) -> None:
        self._seconds = seconds
        self._due = due
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to wait; one that waits already goes on."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._due)

    def stop(self) -> None:
        """Do not wait any more. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Patience:
    """Calls `give_up` once when nothing was answered for `seconds`; 0 waits for ever.

    progress: (answers so far, requests that wait for one). In the event loop's thread.
    """

    def __init__(
        self,
        seconds: float,
        progress: Callable[[], tuple[int, int]],
        give_up: Callable[[], None],
    ) -> None:
        self._step_s = seconds / POLLS
        self._progress = progress
        self._give_up = give_up
        self._answered = -1
        self._silent = 0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to poll, also after `stop`."""
        if self._step_s:
            self._timer = asyncio.get_running_loop().call_later(self._step_s, self._poll)

    def stop(self) -> None:
        """Stop polling. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _poll(self) -> None:
        answered, waiting = self._progress()
        silent = waiting > 0 and answered == self._answered
        self._silent = self._silent + 1 if silent else 0
        self._answered = answered
        if self._silent == POLLS:
            self._timer = None
            self._give_up()
        else:
            self.start()
