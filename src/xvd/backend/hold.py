# SPDX-License-Identifier: Apache-2.0
"""A disk that is held: its storage was away, and is tried again until it is back.

What the storage failed lies unanswered in the queues. It is begun again after a while that doubles
each time, so that its guest sees a delay, and no error.
"""

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from typing import Final

from xvd.backend.disk import ServedDisk
from xvd.backend.storage_log import REMEDIES
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
        self._log.error("%s", self.why)
        self._trying = asyncio.ensure_future(self._try())

    async def _try(self) -> None:
        connection, pause, answered = self._disk.connection, FIRST_S, 0
        began = asyncio.get_running_loop().time()
        await self._report(self.why)
        while connection is not None and connection is self._disk.connection:
            await asyncio.sleep(pause)
            if self._disk.paused:
                continue
            if connection.held:
                answered = connection.counters().responses
                connection.resume()
                pause = min(2 * pause, MOST_S)
            elif connection.counters().responses > answered:
                took = asyncio.get_running_loop().time() - began
                self._log.warning("its storage is back after %.0f s; it was held", took)
                break
        await self._report("")
        self.why, self._trying = "", None

    async def end(self) -> None:
        """Try no more."""
        if self._trying is not None:
            self._trying.cancel()
            await asyncio.gather(self._trying, return_exceptions=True)
            self.why, self._trying = "", None
