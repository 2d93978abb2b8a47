# SPDX-License-Identifier: Apache-2.0
"""Opening an image file or a block device, once, exclusively, and closing it."""

import dataclasses
import errno
import fcntl
import os
import re
import stat
import threading
from functools import partial
from typing import Final

from xvd.engines import block, formats, hostuse, locks
from xvd.engines.bridge import ThreadedChannel
from xvd.engines.file import FileChannel, Health, direct_alignment, make_zero
from xvd.engines.identity import identity_of
from xvd.engines.interface import (
    Channel,
    Engine,
    EngineInfo,
    Extent,
    Opening,
    Scheme,
    ThreadModel,
)
from xvd.engines.layers.zeroes import DetectZeroes
from xvd.errors import ConfigError, EngineError
from xvd.types import PAGE_SIZE, RING_SECTOR_SIZE

_NOT_STORAGE = "neither a file nor a block device; nothing can be kept in it"


def _open(path: str, flags: int) -> int:
    try:
        found = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if stat.S_ISFIFO(os.fstat(found).st_mode):
                raise EngineError(errno.EINVAL, _NOT_STORAGE, path)  # it would wait for a peer
        finally:
            os.close(found)
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


def _check_kind(fd: int, path: str) -> None:
    mode = os.fstat(fd).st_mode
    if stat.S_ISDIR(mode):
        raise EngineError(
            errno.EISDIR, "it is a directory; give an image file or a block device", path
        )
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise EngineError(errno.EINVAL, _NOT_STORAGE, path)


def _check_format(fd: int, path: str) -> None:
    """Refuse what looks like a container of another format, unless the user says it is raw."""
    name = formats.known_format(fd)
    if name:
        raise EngineError(
            errno.EINVAL,
            f"it begins or ends as a {name} image does, and would be served as it lies, not as "
            f"the disk in it: {formats.remedy(name, path)}; if it is raw all the same, "
            f"say so: format=raw, or raw:{path}",
            path,
        )


def path_of(rest: str) -> str:
    """Return the path in what stands behind ``file:`` or ``raw:``, without its options."""
    match = _ZEROES_OPTION.fullmatch(rest)
    return match[1] if match and not os.path.lexists(rest) else rest


def examine(path: str, *, read_only: bool, raw: bool) -> bool:
    """Return whether an image is a block device, if it can be opened; takes no lock, waits for
    nobody, and leaves nothing open.

    raw: whatever its bytes look like. Raises `EngineError` as `FileEngine` does.
    """
    fd = _open(path, os.O_RDONLY if read_only else os.O_RDWR)
    try:
        _check_kind(fd, path)
        if not raw:
            _check_format(fd, path)
        return stat.S_ISBLK(os.fstat(fd).st_mode)
    finally:
        os.close(fd)


class FileEngine(Engine):
    """``file:PATH``: a raw image, or a block device.

    direct: False keeps everything in the page cache. patience_s: how long to wait for a lock that
    a dying predecessor still holds. raw: it is raw whatever its bytes look like. user: whose it is,
    for others who want it too. device_model: a QEMU of the same guest has the image open as well,
    by right. ioctl: how a device is told to discard. call: how files are locked. Raises
    `EngineError` that names the path and the remedy.
    """

    def __init__(
        self,
        path: str,
        *,
        read_only: bool = False,
        direct: bool = True,
        patience_s: float = 0.0,
        raw: bool = False,
        user: str = "",
        device_model: bool = False,
        ioctl: block.Ioctl = fcntl.ioctl,
        call: locks.Fcntl = fcntl.fcntl,
    ) -> None:
        self.path = path
        self._ioctl = ioctl
        self._direct_fd = self._claim_fd = -1
        self._align = (0, 0)
        self._entry: locks.Key | None = None
        self._user = user
        self._health = Health()
        self._flushing = threading.Lock()  # a description is told once: one asks at a time
        flags = os.O_RDONLY if read_only else os.O_RDWR
        self._cached_fd = _open(path, flags)
        try:
            _check_kind(self._cached_fd, path)
            if not raw:
                _check_format(self._cached_fd, path)
            taken = locks.Locks(
                path,
                read_only=read_only,
                patience_s=patience_s,
                holder=lambda: locks.user_of(self._cached_fd),
                qemus=not device_model,
                call=call,
            )
            self._lock(taken, flags, direct, patience_s)
            self._entry = locks.enter(self._cached_fd, user)
            self._info = self._measure(read_only)
            self._promised = self._info.size
        except BaseException:
            self.close()
            raise

    def _lock(self, taken: locks.Locks, flags: int, direct: bool, patience_s: float) -> None:
        """Keep everybody else away: the host itself, QEMU, and others of us."""
        taken.take(self._cached_fd, 0, check=True)
        if flags != os.O_RDONLY:
            if self._is_device:
                self._claim_fd = hostuse.claim(self._cached_fd, self.path, patience_s)
                if file := hostuse.below(self._cached_fd):
                    taken.check_below(file)
            hostuse.check_file(self._cached_fd, self.path)
        if direct and self._open_direct(flags):
            taken.take(self._direct_fd, 1, check=False)

    def _open_direct(self, flags: int) -> bool:
        """Whether there is a second description, that goes past the page cache."""
        self._align = direct_alignment(self._cached_fd)
        if self._align == (0, 0):
            return False
        try:
            # The file that is open, whatever its name means by now.
            again = f"/proc/self/fd/{self._cached_fd}"
            self._direct_fd = os.open(again, flags | os.O_CLOEXEC | os.O_DIRECT)
        except OSError:
            return False  # tmpfs before 6.6 and others: the page cache serves
        return True

    def _measure(self, read_only: bool) -> EngineInfo:
        size = os.lseek(self._cached_fd, 0, os.SEEK_END)
        if size == 0:
            raise EngineError(
                errno.EINVAL, "the image is empty; give it a size: truncate -s 1G IMAGE", self.path
            )
        if size % RING_SECTOR_SIZE:
            raise EngineError(
                errno.EINVAL,
                f"its {size} bytes are no multiple of 512; extend it: "
                f"truncate -s {-(-size // RING_SECTOR_SIZE) * RING_SECTOR_SIZE} {self.path}",
                self.path,
            )
        if self._is_device:
            return self._measure_device(size, read_only)
        unit = os.fstat(self._cached_fd).st_blksize
        return EngineInfo(
            size=size,
            physical_block_size=max(RING_SECTOR_SIZE, min(unit, PAGE_SIZE)),
            read_only=read_only,
            can_discard=not read_only,
            discard_granularity=unit,
            tells_holes=True,
            pins_pages=self._direct_fd >= 0,
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
            physical_block_size=max(
                RING_SECTOR_SIZE, block.get_int(fd, block.BLKPBSZGET, RING_SECTOR_SIZE)
            ),
            read_only=read_only,
            can_discard=discards,
            can_secure_discard=discards and block.takes(fd, block.BLKSECDISCARD, self._ioctl),
            discard_granularity=granularity,
            discard_alignment=alignment,
            pins_pages=self._direct_fd >= 0,
            thread_model=ThreadModel.PARALLEL,
        )

    @property
    def info(self) -> EngineInfo:
        """The size, block sizes and abilities of the file."""
        return self._info

    @property
    def direct(self) -> bool:
        """Whether aligned operations go past the page cache."""
        return self._direct_fd >= 0

    @property
    def identity(self) -> str:
        """Which file or device it is."""
        return identity_of(self._cached_fd)

    @property
    def trouble(self) -> str:
        """A flush that failed, or an image that was cut short, once that was seen."""
        if number := self._health.flush_error:
            return (
                f"a flush failed ({os.strerror(number)}): what was written before it may be lost, "
                "and no flush succeeds until the image is opened anew; check what is on it, then "
                "detach and attach the disk"
            )
        if self._info.size < self._promised:
            return (
                f"the image was cut short behind the disk: {self._info.size} of its "
                f"{self._promised} bytes are left, and what lay behind is an I/O error; bring the "
                "image back, or let the disk be that small: xvd resize --shrink"
            )
        return ""

    def read(self, buffer: memoryview, offset: int) -> None:
        """Read it all; what was cut off behind our back is an error."""
        while len(buffer):
            size = os.preadv(self._cached_fd, [buffer], offset)
            if size == 0:
                raise EngineError(errno.EIO, f"it ends before byte {offset}", self.path)
            buffer, offset = buffer[size:], offset + size

    def write(self, buffer: memoryview, offset: int) -> None:
        """Write it all."""
        while len(buffer):
            size = os.pwritev(self._cached_fd, [buffer], offset)
            buffer, offset = buffer[size:], offset + size

    def flush(self) -> None:
        """fdatasync; after one that failed there is none that succeeds."""
        with self._flushing:
            if not self._health.flush_error:
                try:
                    return os.fdatasync(self._cached_fd)
                except OSError as error:
                    self._health.flush_failed(error.errno or errno.EIO)
        raise EngineError(self._health.flush_error, self.trouble, self.path)

    def discard(self, offset: int, length: int) -> None:
        """Punch a hole in a file; discard a range of a device."""
        if self._is_device:
            block.discard(self._cached_fd, block.BLKDISCARD, offset, length, self._ioctl)
        elif length:
            make_zero(self._cached_fd, True, offset, length)

    def secure_discard(self, offset: int, length: int) -> None:
        """Let a device erase a range; a file cannot: what it held may lie anywhere."""
        if not self._is_device:
            return super().secure_discard(offset, length)
        return block.discard(self._cached_fd, block.BLKSECDISCARD, offset, length, self._ioctl)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Zeros without data, in a file; a device may be slower at it than at writing."""
        if self._is_device:
            super().write_zeroes(offset, length, unmap=unmap)
        elif length:
            make_zero(self._cached_fd, unmap, offset, length)

    def extents(self, offset: int, length: int, most: int) -> list[Extent]:
        """By SEEK_DATA and SEEK_HOLE; what was cut off is no hole, as it does not read as zeros."""
        found: list[Extent] = []
        end = min(offset + length, os.lseek(self._cached_fd, 0, os.SEEK_END))
        at = offset
        while at < end and len(found) < most:
            start = min(end, self._seek(at, os.SEEK_DATA, end))
            hole = start > at
            until = start if hole else min(end, self._seek(at, os.SEEK_HOLE, end))
            found.append(Extent(until - at, hole))
            at = until
        if at < offset + length and len(found) < most:
            found.append(Extent(offset + length - at, hole=False))
        return found

    def _seek(self, offset: int, whence: int, end: int) -> int:
        try:
            return os.lseek(self._cached_fd, offset, whence)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nothing of the kind behind it
                raise
            return end

    def measure(self) -> int:
        """Measure the file or the device; a part of a sector at its end is left out."""
        size = os.lseek(self._cached_fd, 0, os.SEEK_END)
        size -= size % RING_SECTOR_SIZE
        if size != self._info.size:
            self._info = dataclasses.replace(self._info, size=size)
            self._promised = max(size, self._promised)
        return size

    def resize(self, size: int) -> None:
        """Cut a file, or make it longer by a hole. A device has the size that it has."""
        if self._is_device:
            raise EngineError(
                errno.EOPNOTSUPP,
                "a block device is resized by its own tool; then let the disk follow it",
                self.path,
            )
        try:
            os.ftruncate(self._cached_fd, size)
        except OSError as error:
            text = f"it cannot have {size} bytes: {error.strerror}"
            raise EngineError(error.errno or errno.EIO, text, self.path) from None
        self._promised = size

    def accept_size(self) -> None:
        """Promise no more than is left of it."""
        self._promised = self._info.size

    def close(self) -> None:
        """Close the descriptors, and with them the locks."""
        for fd in (self._cached_fd, self._direct_fd, self._claim_fd):
            if fd >= 0:
                os.close(fd)
        self._cached_fd = self._direct_fd = self._claim_fd = -1
        if self._entry is not None:
            locks.leave(self._entry, self._user)
        self._entry = None

    def open_channel(self) -> Channel:
        """A compiled channel on the queue thread's io_uring.

        A device's discards go through a thread of the channel's own: they block.
        """
        discards = ThreadedChannel(self) if self._info.can_discard and self._is_device else None
        memory, offset = (a or 1 for a in self._align)
        return FileChannel(
            self._direct_fd,
            self._cached_fd,
            self._open_again(),
            self._health,
            memory_align=memory,
            offset_align=offset,
            discards=discards,
        )

    def _open_again(self) -> int:
        """Another description of the same file; where none may be had, the same one."""
        flags = os.O_RDONLY if self._info.read_only else os.O_RDWR
        try:
            return os.open(f"/proc/self/fd/{self._cached_fd}", flags | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            return os.dup(self._cached_fd)


_ZEROES = {"off": None, "on": False, "unmap": True}
"""QEMU's words for what a write of zeros becomes: data, zeros that keep their space, or a hole."""
_ZEROES_OPTION = re.compile(r"(.+),detect-zeroes=([^,=/]*)", re.DOTALL)


def _open_uri(rest: str, how: Opening, *, raw: bool = False) -> Engine:
    path, zeroes = rest, "off"
    match = _ZEROES_OPTION.fullmatch(rest)
    if match and not os.path.lexists(rest):  # a file of that name is what is meant
        path, zeroes = match[1], match[2]
        if zeroes not in _ZEROES:
            raise ConfigError(f"detect-zeroes takes {', '.join(_ZEROES)}, not {zeroes!r}")
    engine = FileEngine(
        path,
        read_only=how.read_only,
        patience_s=how.patience_s,
        raw=raw,
        user=how.user,
        device_model=how.device_model,
    )
    unmap = _ZEROES[zeroes]
    return engine if unmap is None else DetectZeroes(engine, unmap=unmap)


def _files(rest: str) -> tuple[str, ...]:
    match = _ZEROES_OPTION.fullmatch(rest)
    return (rest, match[1]) if match else (rest,)


SCHEMES: Final = (
    Scheme("file", "file:PATH", "a raw image file or a block device", _open_uri, _files),
    Scheme(
        "raw",
        "raw:PATH",
        "the same, whatever its bytes look like",
        partial(_open_uri, raw=True),
        _files,
    ),
)
