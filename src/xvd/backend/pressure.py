# SPDX-License-Identifier: Apache-2.0
"""Memory pressure, as Linux tells it: a trigger on /proc/pressure/memory (PSI).

blkback is asked by the kernel's shrinker. A process asks to be woken when somebody had to
wait for memory for so long within a window; it is told at most once in that window.
"""

import asyncio
import contextlib
import logging
import os
import select
from collections.abc import Callable
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

PRESSURE: Final = Path("/proc/pressure/memory")
TRIGGERS: Final = (b"some 70000 1000000\0", b"some 140000 2000000\0")
"""Microseconds of waiting within a window. Without CAP_SYS_RESOURCE windows are of two seconds."""


class MemoryPressure:
    """Calls `on_pressure` in the event loop's thread each time memory becomes short.

    `watching` is False on a kernel without PSI, or where setting a trigger is not permitted: it is
    never called then, which costs memory and nothing else.
    """

    def __init__(self, on_pressure: Callable[[], None], path: Path = PRESSURE) -> None:
        self._on_pressure = on_pressure
        self._fd = -1
        self._epoll: select.epoll | None = None
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            self._set_trigger()
            self._epoll = select.epoll()
            self._epoll.register(self._fd, select.EPOLLPRI)
            # The event loop watches for reading only; an epoll descriptor is readable for anything.
            asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._woken)
        except OSError as error:
            logger.info("%s: %s; idle buffers are kept under memory pressure", path, error.strerror)
            self.close()

    def _set_trigger(self) -> None:
        for trigger in TRIGGERS[:-1]:
            with contextlib.suppress(OSError):
                os.write(self._fd, trigger)
                return
        os.write(self._fd, TRIGGERS[-1])

    @property
    def watching(self) -> bool:
        """Whether pressure will be told of."""
        return self._epoll is not None

    def _woken(self) -> None:
        assert self._epoll is not None
        for _, events in self._epoll.poll(0):
            if events & select.EPOLLERR:
                self.close()
                return
            self._on_pressure()

    def close(self) -> None:
        """Stop. Idempotent."""
        if self._epoll is not None:
            asyncio.get_running_loop().remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
