# SPDX-License-Identifier: Apache-2.0
"""Opening an image file or a block device, once, exclusively, and closing it."""

import dataclasses
import errno
import fcntl
import os
import stat
import struct
import time

from xvd.engines import block
from xvd.engines.bridge import ThreadedChannel
from xvd.engines.file import FileChannel, direct_alignment, punch_hole
from xvd.engines.identity import identity_of
from xvd.engines.interface import Channel, Engine, EngineInfo, ThreadModel
from xvd.errors import EngineError

_F_OFD_SETLK = 37
_RETRY_S = 0.05
_NOT_STORAGE = "neither a file nor a block device; nothing can be kept in it"


def _open(path: str, flags: int) -> int:
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode):
            raise EngineError(errno.EINVAL, _NOT_STORAGE, path)  # opening it would wait for a peer
        return os.open(path, flags | os.O_CLOEXEC)
    except EngineError:
        raise
    except OSError as e:
        remedy = {
            errno.ENOENT: "no such image; make one: truncate -s 1G " + path,
            errno.EACCES: "no permission; open it read-only (-r), or change its owner or mode",
            errno.EPERM: "no permission; open it read-only (-r), or change its owner or mode",
            errno.EROFS: "it lies on a read-only file system; open it read-only (-r)",
            errno.EISDIR: "it is a directory; give an image file or a block device",
            errno.ENXIO: "there is no such device behind the node",
        }.get(e.errno or 0, e.strerror or "cannot be opened")
        raise EngineError(e.errno or errno.EIO, remedy, path) from None


def _lock(fd: int, byte: int, read_only: bool, path: str, patience_s: float) -> None:
    """Lock one byte of the file by an open-file-description lock; readers share."""
    kind = fcntl.F_RDLCK if read_only else fcntl.F_WRLCK
    request = struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0)
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.fcntl(fd, _F_OFD_SETLK, request)
            return
        except OSError as e:
            if e.errno not in (errno.EAGAIN, errno.EACCES):
                return  # a file system without locks: nothing to hold on to
            if time.monotonic() >= deadline:
                raise EngineError(
                    errno.EBUSY,
                    "the image is in use by another process; stop that one first, or open it "
                    "read-only (-r) in both",
                    path,
                ) from None
            time.sleep(_RETRY_S)


class FileEngine(Engine):
    """``file:PATH``: a raw image, or a block device.

    direct: False keeps everything in the page cache. patience_s: how long to wait for a lock that
    a dying predecessor still holds. ioctl: how a device is told to discard. Raises `EngineError`
    that names the path and the remedy.
    """

    def __init__(
        self,
        path: str,
        *,
        read_only: bool = False,
        direct: bool = True,
        patience_s: float = 0.0,
        ioctl: block.Ioctl = fcntl.ioctl,
    ) -> None:
        self.path = path
        self._ioctl = ioctl
        self._direct_fd = -1
        self._align = (0, 0)
        flags = os.O_RDONLY if read_only else os.O_RDWR
        self._cached_fd = _open(path, flags)
        try:
            self._check_kind()
            _lock(self._cached_fd, 0, read_only, path, patience_s)
            if direct:
                self._open_direct(flags, patience_s)
            self._info = self._measure(read_only)
        except BaseException:
            self.close()
            raise

    def _check_kind(self) -> None:
        mode = os.fstat(self._cached_fd).st_mode
        if stat.S_ISDIR(mode):
            raise EngineError(
                errno.EISDIR, "it is a directory; give an image file or a block device", self.path
            )
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise EngineError(errno.EINVAL, _NOT_STORAGE, self.path)

    def _open_direct(self, flags: int, patience_s: float) -> None:
        self._align = direct_alignment(self._cached_fd)
        if self._align == (0, 0):
            return
        try:
            self._direct_fd = os.open(self.path, flags | os.O_CLOEXEC | os.O_DIRECT)
        except OSError:
            return  # tmpfs before 6.6 and others: the page cache serves
        _lock(self._direct_fd, 1, flags == os.O_RDONLY, self.path, patience_s)

    def _measure(self, read_only: bool) -> EngineInfo:
        size = os.lseek(self._cached_fd, 0, os.SEEK_END)
        if size == 0:
            raise EngineError(
                errno.EINVAL, "the image is empty; give it a size: truncate -s 1G IMAGE", self.path
            )
        if size % 512:
            raise EngineError(
                errno.EINVAL,
                f"its {size} bytes are no multiple of 512; extend it: "
                f"truncate -s {-(-size // 512) * 512} {self.path}",
                self.path,
            )
        if self._is_device:
            return self._measure_device(size, read_only)
        unit = os.fstat(self._cached_fd).st_blksize
        return EngineInfo(
            size=size,
            physical_block_size=max(512, min(unit, 4096)),
            read_only=read_only,
            can_discard=not read_only,
            discard_granularity=unit,
            thread_model=ThreadModel.PARALLEL,
        )

    @property
    def _is_device(self) -> bool:
        return stat.S_ISBLK(os.fstat(self._cached_fd).st_mode)

    def _measure_device(self, size: int, read_only: bool) -> EngineInfo:
        fd = self._cached_fd
        granularity, alignment = block.discard_units(fd)
        discards = not read_only and block.takes(fd, block.BLKDISCARD, self._ioctl)
        return EngineInfo(
            size=size,
            physical_block_size=max(512, block.get_int(fd, block.BLKPBSZGET, 512)),
            read_only=read_only,
            can_discard=discards,
            can_secure_discard=discards and block.takes(fd, block.BLKSECDISCARD, self._ioctl),
            discard_granularity=granularity,
            discard_alignment=alignment,
            thread_model=ThreadModel.PARALLEL,
        )

    @property
    def info(self) -> EngineInfo:
        """What the file is."""
        return self._info

    @property
    def direct(self) -> bool:
        """Whether aligned operations go past the page cache."""
        return self._direct_fd >= 0

    @property
    def identity(self) -> str:
        """Which file or device it is."""
        return identity_of(self._cached_fd)

    def read(self, buffer: memoryview, offset: int) -> None:
        """Read it all; what was cut off behind our back reads as zeros."""
        while len(buffer):
            size = os.preadv(self._cached_fd, [buffer], offset)
            if size == 0:
                buffer[:] = bytes(len(buffer))
                return
            buffer, offset = buffer[size:], offset + size

    def write(self, buffer: memoryview, offset: int) -> None:
        """Write it all."""
        while len(buffer):
            size = os.pwritev(self._cached_fd, [buffer], offset)
            buffer, offset = buffer[size:], offset + size

    def flush(self) -> None:
        """fdatasync."""
        os.fdatasync(self._cached_fd)

    def discard(self, offset: int, length: int) -> None:
        """Punch a hole in a file; discard a range of a device."""
        if self._is_device:
            block.discard(self._cached_fd, block.BLKDISCARD, offset, length, self._ioctl)
        else:
            punch_hole(self._cached_fd, offset, length)

    def secure_discard(self, offset: int, length: int) -> None:
        """Let a device erase a range; a file cannot: what it held may lie anywhere."""
        if not self._is_device:
            return super().secure_discard(offset, length)
        return block.discard(self._cached_fd, block.BLKSECDISCARD, offset, length, self._ioctl)

    def measure(self) -> int:
        """Look how long the file or the device is; a part of a sector at its end is left out."""
        size = os.lseek(self._cached_fd, 0, os.SEEK_END)
        size -= size % 512
        if size != self._info.size:
            self._info = dataclasses.replace(self._info, size=size)
        return size

    def resize(self, size: int) -> None:
        """Cut a file, or make it longer by a hole. A device has the size that it has."""
        if self._is_device:
            raise EngineError(
                errno.EOPNOTSUPP,
                "a block device is resized by its own tool; then let the disk follow it",
                self.path,
            )
        os.ftruncate(self._cached_fd, size)

    def close(self) -> None:
        """Close the descriptors, and with them the locks."""
        for fd in (self._cached_fd, self._direct_fd):
            if fd >= 0:
                os.close(fd)
        self._cached_fd = self._direct_fd = -1

    def open_channel(self) -> Channel:
        """A compiled channel on the queue thread's io_uring.

        A device's discards go through a thread of the channel's own: they block.
        """
        discards = ThreadedChannel(self) if self._info.can_discard and self._is_device else None
        memory, offset = (a or 1 for a in self._align)
        return FileChannel(self._direct_fd, self._cached_fd, memory, offset, discards)
