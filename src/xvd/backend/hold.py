# SPDX-License-Identifier: Apache-2.0
"""A disk that is held: its storage was away, and is tried again until it is back.

What the storage failed lies unanswered in the queues. It is begun again after a while that doubles
each time, so that its guest sees a delay, and no error.
"""

import asyncio
import contextlib
import errno
import os
from collections.abc import Awaitable, Callable
from typing import Final

from xvd.backend.disk import ServedDisk
from xvd.backend.storage_log import REMEDIES
from xvd.errors import XvdError
from xvd.xenbus.log import DeviceLog

FIRST_S: Final = 0.5
MOST_S: Final = 30.0
"""From one try to the next."""


class Hold:
    """For the event loop's thread. report: writes the disk's error node, or removes it for ""."""

    def __init__(
        self, disk: ServedDisk, log: DeviceLog, report: Callable[[str], Awaitable[None]]
    ) -> None:
        self.why = ""
        """Why the disk is held, in words; empty while it is not."""
        self._disk = disk
        self._log = log
        self._report = report
        self._trying: asyncio.Task[None] | None = None

    def begin(self, number: int) -> None:
        """The storage has failed with this errno, and a queue holds what it failed."""
        if self._trying is not None:
            return
        remedy = REMEDIES.get(number, "bring it back, or give the disk other storage: xvd swap")
        why = f"{errno.errorcode.get(number, number)}, {os.strerror(number)}"
        self.why = f"held until its storage is back ({why}): {remedy}"
        self._log.error("%s", self.why, event="held")
        self._trying = asyncio.ensure_future(self._try())

    async def _try(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            began = clock()
            await self._say(self.why)
            if await self._is_back():
                self._log.warning(
                    "its storage is back after %.0f s; it was held", clock() - began, event="back"
                )
            await self._say("")
            if self._disk.connection is None or not self._disk.connection.held:
                break  # and nobody has been told meanwhile that it is away again
        self.why, self._trying = "", None

    async def _is_back(self) -> bool:
        """Begin again what is held, until that is answered; False if its guest leaves the disk."""
        pause, tried, answered = FIRST_S, self._disk.connection, 0
        while True:
            await asyncio.sleep(pause)
            connection = self._disk.connection
            if connection is None:
                return False
            if self._disk.paused:
                continue
            if connection.held:
                tried, answered = connection, connection.counters().responses
                connection.resume()
                pause = min(2 * pause, MOST_S)
            elif connection is not tried or connection.counters().responses > answered:
                return True

    async def end(self) -> None:
        """Try no more."""
        if self._trying is not None:
            self._trying.cancel()
            await asyncio.gather(self._trying, return_exceptions=True)
            self.why, self._trying = "", None
            await self._say("")

    async def _say(self, text: str) -> None:
        with contextlib.suppress(XvdError):  # the store may be gone, and soon this daemon is too
            await self._report(text)
