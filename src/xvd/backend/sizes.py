# SPDX-License-Identifier: Apache-2.0
"""Poll the size of every disk's storage, by as few threads as storage allows.

One thread asks for one after another, which costs less than a thread for each. Where it gets no
answer it is left to that disk, and another goes on with the rest: storage that hangs costs its own
disk only, and one thread for as long as it hangs.
"""

import asyncio
import threading
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from xvd.xenbus.runner import Runtime

PATIENCE_S = 1.0
"""How long one disk's storage may take to tell its size before the others are asked by another."""


class _Disk(Protocol):
    def has_another_size(self) -> bool:
        """Whether its storage has not the size that it has; may hang."""


_D = TypeVar("_D", bound=_Disk)


class _Round(Generic[_D]):
    """One thread's way through some disks; read by the event loop while it goes."""

    def __init__(self, devices: Sequence[_D], hanging: set[_D]) -> None:
        self.waiting = list(devices)
        self.changed: list[_D] = []
        self.current: _D | None = None
        self._hanging = hanging
        self._mutex = threading.Lock()
        self._left = False

    def work(self) -> None:
        """Ask one disk after another, until `leave`."""
        while self._next():
            assert self.current is not None
            if self.current.has_another_size():
                self.changed.append(self.current)

    def _next(self) -> bool:
        with self._mutex:
            if self._left:
                assert self.current is not None
                self._hanging.discard(self.current)  # it has answered after all
                return False
            self.current = self.waiting.pop(0) if self.waiting else None
            return self.current is not None

    def leave(self, device: _D) -> bool:
        """Leave the thread to this disk, if it is still there; then the rest is nobody's."""
        with self._mutex:
            if self.current is not device:
                return False
            self._left = True
            self._hanging.add(device)
            return True


class SizePoll(Generic[_D]):
    """Polls disks' sizes; in the event loop's thread."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.hanging: set[_D] = set()
        """Those that have not answered yet."""

    async def poll(self, devices: Sequence[_D]) -> list[_D]:
        """Return the disks whose storage has another size; without those that hang."""
        waiting = [device for device in devices if device not in self.hanging]
        changed: list[_D] = []
        while waiting:
            this = _Round(waiting, self.hanging)
            working = asyncio.ensure_future(self._runtime.call(this.work))
            try:
                await self._watch(this, working)
            finally:
                working.cancel()
            changed += this.changed
            waiting = this.waiting
        return changed

    async def _watch(self, this: _Round[_D], working: asyncio.Future[None]) -> None:
        """Wait until the round has ended, or its thread is left to a disk that does not answer."""
        before: _D | None = None
        while not working.done():
            await asyncio.wait([working], timeout=PATIENCE_S)
            now = this.current
            if not working.done() and now is not None and now is before and this.leave(now):
                return
            before = now
