# SPDX-License-Identifier: Apache-2.0
"""The one validating layer in front of every engine; `open_engine` puts it there.

Engines behind it may assume valid input: inside the size, whole logical blocks, no writes or
discards where `info` rules them out.
"""

import dataclasses
import errno
import weakref

from xvd.engines.channel import CheckedChannel
from xvd.engines.interface import Channel, Engine, EngineInfo, Extent
from xvd.errors import EngineError


class Checked(Engine):
    """An engine that only lets possible operations through."""

    def __init__(self, lower: Engine) -> None:
        self.lower = lower
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
        """The info of the engine behind."""
        return self._info

    @property
    def identity(self) -> str:
        """Which storage is behind."""
        return self.lower.identity

    @property
    def trouble(self) -> str:
        """That of the engine behind."""
        return self.lower.trouble

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

    def read(self, buffer: memoryview, offset: int) -> None:
        """Check, then read."""
        self._check(offset, buffer.nbytes)
        self.lower.read(buffer, offset)

    def write(self, buffer: memoryview, offset: int) -> None:
        """Check, then write."""
        self._check(offset, buffer.nbytes)
        self._check_writable()
        self.lower.write(buffer, offset)

    def flush(self) -> None:
        """Flush."""
        self.lower.flush()

    def discard(self, offset: int, length: int) -> None:
        """Check, then discard."""
        self._check(offset, length)
        self._check_writable()
        if not self._info.can_discard:
            raise EngineError(errno.EOPNOTSUPP, "the storage cannot discard")
        if length:  # nothing is always discarded, whatever storage says to it
            self.lower.discard(offset, length)

    def secure_discard(self, offset: int, length: int) -> None:
        """Check, then erase."""
        self._check(offset, length)
        self._check_writable()
        if not self._info.can_secure_discard:
            raise EngineError(errno.EOPNOTSUPP, "the storage cannot erase securely")
        if length:
            self.lower.secure_discard(offset, length)

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

    def accept_size(self) -> None:
        """Pass on."""
        self.lower.accept_size()

    def close(self) -> None:
        """Close the engine behind."""
        self.lower.close()

    def open_channel(self) -> Channel:
        """A checking channel in front of the engine's own."""
        channel = CheckedChannel(self.lower.open_channel(), self._info)
        self._channels.add(channel)
        return channel
