# SPDX-License-Identifier: Apache-2.0
"""The one validating layer in front of every engine; `open_engine` puts it there.

Engines behind it may assume valid input: inside the size, whole logical blocks, no writes or
discards where `info` rules them out.
"""

import dataclasses
import errno
import weakref
from collections.abc import Callable

from xvd.engines.channel import CheckedChannel
from xvd.engines.interface import Channel, Engine, EngineInfo, Extent
from xvd.engines.layers.base import Asked, Layer
from xvd.errors import EngineError
from xvd.types import EngineOp


class Checked(Layer):
    """An engine that only lets possible operations through."""

    def __init__(self, lower: Engine) -> None:
        super().__init__(lower)
        self._info = lower.info
        self._channels: weakref.WeakSet[CheckedChannel] = weakref.WeakSet()
        size, block = self._info.size, self._info.logical_block_size
        if size % block:
            raise EngineError(
                errno.EINVAL,
                f"the image has {size} bytes, no multiple of its {block}-byte blocks; "
                f"extend it: truncate -s {-(-size // block) * block} IMAGE",
            )

    @property
    def info(self) -> EngineInfo:
        """The info of the engine behind, of the size that operations are checked by."""
        return self._info

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self._info.size:
            raise EngineError(
                errno.EINVAL, f"{length} bytes at {offset} are not within {self._info.size}"
            )
        if (offset | length) % self._info.logical_block_size:
            raise EngineError(
                errno.EINVAL,
                f"{length} bytes at {offset}: not whole blocks of {self._info.logical_block_size}",
            )

    def _check_writable(self) -> None:
        if self._info.read_only:
            raise EngineError(errno.EROFS, "the disk is read-only")

    def perform(self, asked: Asked, do: Callable[[], None]) -> None:
        """Check one operation as its channel would (channel.pyx), then do it."""
        if asked.op is not EngineOp.FLUSH:
            self._check(asked.offset, asked.length)
        if asked.op in (EngineOp.WRITE, EngineOp.DISCARD):
            self._check_writable()
        if asked.op is EngineOp.DISCARD:
            if asked.secure and not self._info.can_secure_discard:
                raise EngineError(errno.EOPNOTSUPP, "the storage cannot erase securely")
            if not asked.secure and not self._info.can_discard:
                raise EngineError(errno.EOPNOTSUPP, "the storage cannot discard")
            if not asked.length:  # nothing is always discarded, whatever storage says to it
                return
        do()

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Check, then let it be zeros."""
        self._check(offset, length)
        self._check_writable()
        if length:
            self.lower.write_zeroes(offset, length, unmap=unmap)

    def extents(self, offset: int, length: int, most: int) -> list[Extent]:
        """Check, then ask."""
        self._check(offset, length)
        return self.lower.extents(offset, length, most)

    def measure(self) -> int:
        """Measure, and from now on check by it; what is no whole block at the end is left out."""
        size = self.lower.measure()
        size -= size % self._info.logical_block_size
        if size == self._info.size:  # nearly always: a daemon measures every disk now and then
            return size
        self._info = dataclasses.replace(self._info, size=size)
        for channel in self._channels:
            channel.set_size(size)
        return size

    def resize(self, size: int) -> None:
        """Check, then resize."""
        self._check_writable()
        block = self._info.logical_block_size
        if size <= 0 or size % block:
            raise EngineError(errno.EINVAL, f"{size} bytes are not whole blocks of {block}")
        self.lower.resize(size)

    def open_channel(self) -> Channel:
        """A checking channel in front of the engine's own."""
        channel = CheckedChannel(self.lower.open_channel(), self._info)
        self._channels.add(channel)
        return channel
