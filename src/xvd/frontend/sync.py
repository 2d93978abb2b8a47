# SPDX-License-Identifier: Apache-2.0
"""The same disk for code without an event loop: each call submits to the asynchronous one, waits.

Any number of threads may use one `SyncDisk`; each call blocks its own thread only.
"""

import asyncio
import errno
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Self, TypeVar

from xvd.frontend.disk import Disk

T = TypeVar("T")


class SyncDisk:
    """Runs an event loop in a thread of its own; `connect` makes the `Disk` in it.

    release: what `close` does in that thread after the disk is closed, as to end the disk's host.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Disk]],
        *,
        release: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._release = release
        self._closing = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="xvd-disk", daemon=True)
        self._thread.start()
        try:
            self._disk = self._wait(self._connect(connect))
        except BaseException:
            self._stop()
            raise

    @staticmethod
    async def _connect(connect: Callable[[], Awaitable[Disk]]) -> Disk:
        return await connect()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            going_on = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:  # the loop is closed
            work.close()
            raise OSError(errno.ENODEV, "the disk is gone: it was closed") from None
        return going_on.result()

    @staticmethod
    async def _cancel_the_rest() -> None:
        """Cancel what `connect` left running, as its store's reader: nobody can reach it."""
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    def _stop(self) -> None:
        self._wait(self._cancel_the_rest())
        self._wait(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def disk(self) -> Disk:
        """The disk behind, for what it is; its operations belong to its own thread."""
        return self._disk

    @property
    def size(self) -> int:
        """Capacity in bytes."""
        return self._disk.size

    def read(self, offset: int, length: int) -> bytearray:
        """Read, as `Disk.read`."""
        return self._wait(self._disk.read(offset, length))

    def write(
        self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False
    ) -> None:
        """Write, as `Disk.write`."""
        self._wait(self._disk.write(offset, data, fua=fua))

    def flush(self) -> None:
        """Flush, as `Disk.flush`."""
        self._wait(self._disk.flush())

    def discard(self, offset: int, length: int, *, secure: bool = False) -> None:
        """Discard, as `Disk.discard`."""
        self._wait(self._disk.discard(offset, length, secure=secure))

    def close(self) -> None:
        """Close, as `Disk.close`, and end the thread. Idempotent."""
        with self._closing:
            if self._loop.is_closed():
                return
            try:
                self._wait(self._leave())
            finally:
                self._stop()

    async def _leave(self) -> None:
        try:
            await self._disk.close()
        finally:
            if self._release is not None:
                await self._release()
