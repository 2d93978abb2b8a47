# SPDX-License-Identifier: Apache-2.0
"""The events that wait for a device's actor, as few as there are kinds of them (XSA-349).

A guest can change its nodes faster than a device acts: what waits must not grow with it. What a
frontend's state says is a level, so the newest is all that counts; of anything else once is enough.
"""

import asyncio

from xvd.blkif.handshake import BackendEvent

_LEVEL = "FRONTEND_"


class Inbox:
    """A queue of `BackendEvent`, and of None for the end. For the event loop's thread."""

    def __init__(self) -> None:
        self._waiting: list[BackendEvent | None] = []
        self._wakeup = asyncio.Event()

    def __len__(self) -> int:
        """How many events wait."""
        return len(self._waiting)

    def put(self, event: BackendEvent | None) -> None:
        """Let the actor have it; a newer level takes the place of the one before, at the end."""
        if event is not None and event.name.startswith(_LEVEL):
            self._waiting = [e for e in self._waiting if not (e and e.name.startswith(_LEVEL))]
        if event not in self._waiting:
            self._waiting.append(event)
        self._wakeup.set()

    async def get(self) -> BackendEvent | None:
        """The next event, waiting for one."""
        while not self._waiting:
            self._wakeup.clear()
            await self._wakeup.wait()
        return self._waiting.pop(0)
