# SPDX-License-Identifier: Apache-2.0
"""Another storage that becomes the same as a disk's, and stays so (mirror.pyx)."""

import errno
import mmap
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
    `copy` and `finish` are for one thread at a time, any.
    """

    def __init__(self, lower: Engine, target: Engine, changed: ChangeMap | None = None) -> None:
        super().__init__(lower)
        self.target = target
        self._size = lower.info.size
        todo = ChangeMap(bytearray(map_size(self._size)), self._size)
        if changed is None:
            todo.mark_all()
        else:
            todo.add(changed)
        self._twins = Twins(todo, self._size)
        self._buffer = memoryview(mmap.mmap(-1, _RUN * GRANULE))  # aligned, for direct I/O

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
        how many that were. 0: there is nothing of that kind now.

        Raises the error of either storage; after one of the target it is no mirror any more.
        """
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
        """Copy all that is left and make it durable; only while nobody writes."""
        while self.copy(self._size):
            pass
        self.target.flush()
        if self._twins.failed or self._twins.todo.marked:
            raise EngineError(self._twins.failed or errno.EIO, "the target does not have it all")

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
