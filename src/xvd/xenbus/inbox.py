# SPDX-License-Identifier: Apache-2.0
"""How much a peer that changes its nodes as often as it likes can make a device do (XSA-349).

What waits must not grow with it: each event waits once, however often it was put. The peer's state
is no event but a level: that it is to be read waits, once, and it is read when its place comes.

Nor must the store's work: each reading costs it several requests, which others wait behind. A life
cycle needs some tens at once and few after that; whoever makes more necessary waits for them
himself.
"""

import asyncio
import time
from collections.abc import Callable
from enum import Enum, auto
from typing import Final, Generic, TypeVar

_E = TypeVar("_E", bound=Enum)

READS_FREE: Final = 64
READS_PER_SECOND: Final = 50.0


class Order(Enum):
    """What an actor can be told beside the events of its table."""

    POLL = auto()
    """Read the nodes of the peer, and our own, and feed what they say."""
    LEAVE = auto()
    """Return, and leave the nodes as they are: the process ends, or has lost the store."""


class Inbox(Generic[_E]):
    """A queue in which everything waits once. For the event loop's thread."""

    def __init__(self) -> None:
        self._waiting: dict[_E | Order, None] = {}
        self._wakeup = asyncio.Event()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def put(self, item: _E | Order) -> None:
        """Let the actor have it after what waits already; what waits already keeps its place."""
        self._waiting.setdefault(item)
        self._wakeup.set()

    async def get(self) -> _E | Order:
        """The next one, waiting for it."""
        while not self._waiting:
            self._wakeup.clear()
            await self._wakeup.wait()
        item = next(iter(self._waiting))
        del self._waiting[item]
        return item


class Pace:
    """Lets so many readings go at once and so many more in each second. For one thread.

    clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left = float(READS_FREE)
        self._since = clock()

    def wait_s(self) -> float:
        """Take one reading's place; how long to wait before it, seconds, mostly 0.0."""
        now = self._clock()
        self._left = min(READS_FREE, self._left + (now - self._since) * READS_PER_SECOND) - 1
        self._since = now
        return max(0.0, -self._left / READS_PER_SECOND)
