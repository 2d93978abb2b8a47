# SPDX-License-Identifier: Apache-2.0
"""Who may have an image open beside us: nobody if anybody writes.

All by open-file-description locks, which the kernel releases when the last operation in flight on
the description has ended, even if the process was killed. Byte 0 (of the description through the
page cache) and byte 1 (of the other one) are ours: one writer or any number of readers, without a
moment between two checks. The others are QEMU's (block/file-posix.c): for each thing that it does
with an image, and for each that it suffers from nobody else, it holds a shared lock on a byte, and
then checks whether anybody holds a byte that stands against it. We do the same, so that QEMU, its
tools and we keep out of each other's way.
"""

import errno
import fcntl
import logging
import os
import struct
import time
from collections.abc import Callable
from typing import Final

from xvd.errors import EngineError

logger = logging.getLogger(__name__)

F_OFD_GETLK: Final = 36
F_OFD_SETLK: Final = 37
_FLOCK: Final = struct.Struct("hhqqi4x")
_RETRY_S: Final = 0.05

QEMU_DOES: Final = 100
"""RAW_LOCK_PERM_BASE: the byte from here on that is locked by whoever does a thing."""
QEMU_SUFFERS_NOT: Final = 200
"""RAW_LOCK_SHARED_BASE: and by whoever suffers it from nobody else."""
QEMU_THINGS: Final = ("consistent read", "write", "write unchanged", "resize")
"""BLK_PERM_*, by bit."""
_READ, _WRITE, _RESIZE = 0, 1, 3

Fcntl = Callable[[int, int, bytes], bytes]
"""`fcntl.fcntl`, or what stands for a file system without locks: descriptor, command, lock."""

_told: set[int] = set()
"""File systems, by device number, that were said to have no locks."""


class Busy(Exception):
    """Somebody holds what stands against us; the text says who, as far as that can be known."""


class Locks:
    """The locks of one image. Raises `EngineError` for one that is in use, `holder` in its text.

    holder: says who in this process has the image, or nothing. qemus: False where a QEMU is to
    have the image beside us, and only our own locks count.
    """

    def __init__(
        self, path: str, *, read_only: bool, patience_s: float, holder: Callable[[], str],
        qemus: bool = True, call: Fcntl = fcntl.fcntl,
    ) -> None:  # fmt: skip
        self._path = path
        self._read_only = read_only
        self._deadline = time.monotonic() + patience_s
        self._holder = holder
        self._call = call
        self._does = ((_READ,) if read_only else (_READ, _WRITE)) if qemus else ()
        self._suffers_not = (_WRITE, _RESIZE) if qemus else ()

    def take(self, fd: int, own_byte: int, *, check: bool) -> None:
        """Take all locks on a description, waiting for a predecessor that is dying.

        check: whether to check for those of others; not for a second description of ours.
        """
        while True:
            try:
                self._try(fd, own_byte, check=check)
                return
            except Busy as busy:
                if time.monotonic() >= self._deadline:
                    raise EngineError(errno.EBUSY, self._words(str(busy)), self._path) from None
            except OSError as error:
                self._say_none(fd, error)
                return
            time.sleep(_RETRY_S)

    def check_below(self, path: str) -> None:
        """Check whether somebody has the file below a loop device, which passes no lock on."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return  # not ours to see
        try:
            for base in (QEMU_DOES, QEMU_SUFFERS_NOT):
                self._check(fd, base + _WRITE, QEMU_THINGS[_WRITE])
        except Busy as busy:
            who = user_of(fd) or str(busy)
            text = f"{path}, which lies below it, is in use by {who}; stop that one first"
            raise EngineError(errno.EBUSY, text, self._path) from None
        except OSError as error:
            self._say_none(fd, error)
        finally:
            os.close(fd)

    def _words(self, who: str) -> str:
        if ours := self._holder():
            return f"the image is in use by {ours}; detach that one first"
        return (
            f"the image is in use by {who}; stop that one first, or open it read-only (-r) in both"
        )

    def _try(self, fd: int, own_byte: int, *, check: bool) -> None:
        self._set(fd, fcntl.F_RDLCK if self._read_only else fcntl.F_WRLCK, own_byte)
        for base, things in ((QEMU_DOES, self._does), (QEMU_SUFFERS_NOT, self._suffers_not)):
            for thing in things:
                self._set(fd, fcntl.F_RDLCK, base + thing)
        if not check:
            return
        try:
            for base, things in ((QEMU_SUFFERS_NOT, self._does), (QEMU_DOES, self._suffers_not)):
                for thing in things:
                    self._check(fd, base + thing, QEMU_THINGS[thing])
        except Busy:
            self._release(fd)
            raise

    def _release(self, fd: int) -> None:
        """Give all back at once, so that of two who check at the same time one finds it free: the
        next to check may have it."""
        self._call(fd, F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))

    def _set(self, fd: int, kind: int, byte: int) -> None:
        try:
            self._call(fd, F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise Busy("another process") from None
            raise

    def _check(self, fd: int, byte: int, thing: str) -> None:
        """Whether another description holds a byte: it would keep us from writing to it."""
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        kind = _FLOCK.unpack(self._call(fd, F_OFD_GETLK, asked))[0]
        if kind != fcntl.F_UNLCK:
            raise Busy(f"another process, a QEMU or one like it (its lock for {thing!r})")

    def _say_none(self, fd: int, error: OSError) -> None:
        """Warn once for each file system that nothing there keeps a second writer away."""
        number = os.fstat(fd).st_dev
        if number in _told:
            return
        _told.add(number)
        logger.warning(
            "%s: its file system has no locks (%s): nothing keeps another process from writing to "
            "this image or another one there; see that none does", self._path, error.strerror,
        )  # fmt: skip


Key = tuple[int, int, int]
_users: dict[Key, list[str]] = {}
"""Images that this process has open, by `key_of`: whose they are."""


def key_of(fd: int) -> Key:
    """Return what two descriptors of one file or device have in common, and no other has."""
    found = os.fstat(fd)
    return (found.st_rdev, 0, 0) if found.st_rdev else (0, found.st_dev, found.st_ino)


def enter(fd: int, user: str) -> Key:
    """Note that this process has an image open for `user`; for `leave`."""
    key = key_of(fd)
    _users.setdefault(key, []).append(user)
    return key


def leave(key: Key, user: str) -> None:
    """Forget it."""
    _users[key].remove(user)
    if not _users[key]:
        del _users[key]


def user_of(fd: int) -> str:
    """Name who in this process has the image open; empty if nobody."""
    users = _users.get(key_of(fd), [])
    named = sorted(filter(None, users))
    if named:
        return f"this daemon's disk {', '.join(named)}"
    return "this process already" if users else ""
