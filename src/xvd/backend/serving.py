# SPDX-License-Identifier: Apache-2.0
"""A disk while a frontend is connected: its queues run, and call when something is to be told."""

import asyncio
import errno
from collections.abc import Callable
from typing import Final

from xvd.backend.connection import Connection
from xvd.backend.opened import Opened
from xvd.xenbus.runner import Runtime

QUIET_S: Final = 10.0
"""How long failures of the storage are not told again: a guest can cause any number of them."""


class Serving:
    """A connection whose threads run, until `end` or until one of its rings is broken.

    Raises OSError if no thread can be had, with the connection given back. on_end: called once
    when no queue runs any more, before everything is given back. on_withdrawn: with the
    operations that the storage turned out not to do, as bits. on_cut: the storage may have become
    smaller.
    """

    def __init__(
        self,
        connection: Connection,
        opened: Opened,
        runtime: Runtime,
        *,
        on_end: Callable[["Serving"], None],
        on_withdrawn: Callable[[int], None],
        on_cut: Callable[[], None],
    ) -> None:
        self.connection = connection
        self._opened = opened
        self._on_end = on_end
        self._on_withdrawn = on_withdrawn
        self._on_cut = on_cut
        self._failures = 0
        self._released = asyncio.Event()
        try:
            connection.serve(runtime, self._all_ended)
        except BaseException:
            connection.release()
            raise

    def begin(self, *, resumed: bool) -> None:
        """Hear of alarms; resumed: a predecessor's responses may lie there unannounced."""
        if resumed:
            self.connection.kick()
        self.connection.listen(self._alarmed)

    async def end(self) -> None:
        """Finish what is in flight and give everything back."""
        self.connection.drain()
        await self._released.wait()

    def _all_ended(self) -> None:
        """The queues are drained, or a ring is broken: give everything back at once."""
        self.connection.mute()
        self._on_end(self)
        self.connection.release()
        self._released.set()

    @property
    def _ended(self) -> bool:
        return self._released.is_set()

    def _alarmed(self) -> None:
        """The storage failed, or cannot do something: the queue's thread rang."""
        number, failures = self.connection.storage_failures()
        if withdrawn := self.connection.withdrawn():
            self._on_withdrawn(withdrawn)
        if failures > self._failures:
            self._failures = failures
            self._say_failure(number)

    def _say_failure(self, number: int) -> None:
        self.connection.mute()
        self._opened.said.failed(self._opened.engine, number, self._failures)
        if number == errno.EIO:
            self._on_cut()

        def listen_again() -> None:
            if not self._ended:
                self.connection.listen(self._alarmed)

        asyncio.get_running_loop().call_later(QUIET_S, listen_again)
