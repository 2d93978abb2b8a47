# SPDX-License-Identifier: Apache-2.0
"""What waits for a device's actor: each event once, however often it was put (XSA-349).

A peer can change its nodes faster than a device acts: what waits must not grow with it. So its
state is no event but a level: that it is to be read waits, once, and it is read when its place
comes.
"""

import asyncio
from enum import Enum, auto
from typing import Generic, TypeVar

_E = TypeVar("_E", bound=Enum)


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
