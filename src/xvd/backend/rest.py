# SPDX-License-Identifier: Apache-2.0
"""Waiting until no queue of a connection has anything in flight.

Each queue writes to one eventfd when it has come to rest, which counts them.
"""

import asyncio
import os


class Rest:
    """One wait after the other, for so many queues. For the event loop's thread.

    Raises OSError if no descriptor can be had.
    """

    def __init__(self, queues: int) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._queues = queues
        self._missing = 0
        self._waiter: asyncio.Future[None] | None = None
        asyncio.get_running_loop().add_reader(self.fd, self._came)

    def begin(self) -> asyncio.Future[None]:
        """Count anew from here on; done when all queues have come to rest."""
        self._missing = self._queues
        self._waiter = asyncio.get_running_loop().create_future()
        return self._waiter

    def _came(self) -> None:
        self._missing -= os.eventfd_read(self.fd)
        waiter = self._waiter
        if self._missing <= 0 and waiter is not None and not waiter.done():
            waiter.set_result(None)

    def fail(self, error: Exception) -> None:
        """They will not come to rest: whoever waits is told why."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)

    def close(self) -> None:
        """Give the descriptor back; nobody may write to it any more. Idempotent."""
        if self.fd >= 0:
            asyncio.get_running_loop().remove_reader(self.fd)
            os.close(self.fd)
            self.fd = -1
