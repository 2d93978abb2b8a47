# SPDX-License-Identifier: Apache-2.0
"""Another storage that becomes the same as a disk's, and stays so (mirror.pyx)."""

import errno
import mmap
import threading
from collections.abc import Callable
from typing import Final

from xvd.engines.changes import GRANULE, ChangeMap, map_size
from xvd.engines.interface import Channel, Engine
from xvd.engines.layers.base import Asked, Layer
from xvd.engines.live.tracked import CHANGING
from xvd.engines.mirror import MirrorChannel, Twins
from xvd.engines.zeroes import all_zero
from xvd.errors import EngineError

_RUN: Final = 16
"""Granules that are copied in one piece: 1 MiB."""


class Mirror(Layer):
    """The storage of a disk, whose changes `target` gets as well, and what it lacks by `copy`.

    changed: what the target lacks; None: everything. The disk keeps its size while this is so.
    `copy`, `finish` and `stop` are for any thread: one copies at a time, also where whoever had it
    copy waits for it no longer.
    """

    def __init__(self, lower: Engine, target: Engine, changed: ChangeMap | None = None) -> None:
        super().__init__(lower)
        self.target = target
        self._size = lower.info.size
        todo = ChangeMap(bytearray(map_size(self._size)), self._size)
        self._twins = Twins(todo, self._size)
        if changed is None:
            todo.mark_all()
        else:
            self.lacks(changed)
        self._copying = threading.Lock()
        self._stopped = False
        self._buffer = memoryview(mmap.mmap(-1, _RUN * GRANULE))  # aligned, for direct I/O

    def lacks(self, changed: ChangeMap) -> None:
        """Note what the target lacks besides; before the first channel is opened."""
        self._twins.todo.add(changed)

    @property
    def left(self) -> int:
        """How many bytes the target may lack."""
        return min(self._twins.todo.marked * GRANULE, self._size)

    def perform(self, asked: Asked, do: Callable[[], None]) -> None:
        """Do it; what it changes is copied later."""
        if asked.op not in CHANGING:
            do()
            return
        self._twins.enter(asked.offset, asked.length)
        try:
            do()
        finally:
            self._twins.leave(asked.offset, asked.length)

    def copy(self, most: int) -> int:
        """Copy `most` bytes, or a little more, of what the target lacks and nobody is writing to;
        how many that were. 0: there is nothing of that kind now, or another thread copies.

        Raises the error of either storage; after one of the target it is no mirror any more.
        """
        if not self._copying.acquire(blocking=False):
            return 0
        try:
            return self._copy(most)
        finally:
            self._copying.release()

    def _copy(self, most: int) -> int:
        done = 0
        while done < most:
            if self._twins.failed:
                raise EngineError(self._twins.failed, "a guest's write to the target failed")
            if (run := self._twins.take(_RUN)) is None:
                break
            try:
                self._copy_run(*run)
            except BaseException:
                self._twins.put_back()
                raise
            self._twins.copied()
            done += run[1]
        return done

    def _copy_run(self, offset: int, length: int) -> None:
        data = self._buffer[:length]
        self.lower.read(data, offset)
        try:
            if all_zero(data):
                try:
                    self.target.write_zeroes(offset, length, unmap=True)
                    return
                except EngineError as error:
                    if error.errno != errno.EOPNOTSUPP:
                        raise
            self.target.write(data, offset)
        except OSError as error:
            self._twins.fail(error.errno or errno.EIO)
            raise

    def finish(self) -> None:
        """Copy all that is left and make it durable; only while nobody writes. Raises `EngineError`
        where that could not be done, or somebody has it stopped, or still copies."""
        if not self._copying.acquire(blocking=False):
            raise EngineError(errno.EBUSY, "what was begun before is still being copied; again")
        try:
            self._stopped = False
            while not self._stopped and self._copy(_RUN * GRANULE):
                pass
            self.target.flush()
            if self._stopped:
                raise EngineError(errno.ECANCELED, "the copy took too long")
            if self._twins.failed or self._twins.todo.marked:
                failed = self._twins.failed or errno.EIO
                raise EngineError(failed, "the target does not have it all")
        finally:
            self._copying.release()

    def stop(self) -> None:
        """Let a `finish` that nobody waits for come to its end."""
        self._stopped = True

    @property
    def copies(self) -> bool:
        """Whether a thread is within `copy` or `finish`."""
        return self._copying.locked()

    def measure(self) -> int:
        """Its size stays, whatever its storage's is."""
        return self._size

    def resize(self, size: int) -> None:
        """Raise `EngineError`: what is copied has one size."""
        del size
        raise EngineError(errno.EBUSY, "the disk is being copied; wait for that, or cancel it")

    def open_channel(self) -> Channel:
        """A channel to both."""
        lower = self.lower.open_channel()
        try:
            return MirrorChannel(lower, self.target.open_channel(), self._twins)
        except BaseException:
            lower.close()
            raise

    def close(self) -> None:
        """Close both."""
        try:
            self.target.close()
        finally:
            self.lower.close()
