# SPDX-License-Identifier: Apache-2.0
"""Opens files for a confined worker: it calls openat(2) as ever, and gets what it may have.

The kernel stops the worker in the call and tells us (seccomp_unotify(2)). We read the name once
from its memory, decide by our copy, open the file ourselves, and put the descriptor into the
worker. So a name that changes meanwhile changes nothing.
"""

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import select
import stat
import struct
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

from xvd.loglimit import LogLimit
from xvd.service.sandbox import reach
from xvd.service.sandbox.reach import Decision, Image, Way

logger = logging.getLogger(__name__)

# linux/seccomp.h: struct seccomp_notif, seccomp_notif_resp, seccomp_notif_addfd.
_NOTIFICATION: Final = struct.Struct("=QIIiIQ6Q")
_ANSWER: Final = struct.Struct("=QqiI")
_DESCRIPTOR: Final = struct.Struct("=QIIII")
_RECEIVE, _SEND, _ADD_FD = 0xC0502100, 0xC0182101, 0x40182103
_STILL_THERE: Final = 0x40082102
_CONTINUE: Final = 1
_AND_ANSWER: Final = 2
"""SECCOMP_ADDFD_FLAG_SEND: the descriptor's number is the call's result (Linux 5.14)."""

_PIDFD_GETFD: Final = 438
"""A system call; the same number on every architecture."""

_RESTRICT_DOMID: Final = 0x24506
"""evtchn.h: IOCTL_EVTCHN_RESTRICT_DOMID."""

_PATH_MAX: Final = 4096
_AT_FDCWD: Final = -100
_KEPT_FLAGS: Final = (
    os.O_ACCMODE | os.O_DIRECT | os.O_EXCL | os.O_CREAT | os.O_NONBLOCK | os.O_DIRECTORY
    | os.O_NOFOLLOW | os.O_SYNC | os.O_DSYNC | os.O_PATH | os.O_LARGEFILE
)  # fmt: skip

BURST: Final = 4000
RATE: Final = 500.0
"""Calls a second, once a burst is used up: a worker that asks for more has to wait."""

_QUICK: Final = ("/proc/", "/sys/", "/dev/null", "/dev/zero", "/dev/urandom", "/dev/xen/")

_REFUSED: Final = "the process of domain %s was refused the file %s"


@dataclass(frozen=True, slots=True)
class _Call:
    """A call that waits: ours to answer by its number. pid: of the thread."""

    number: int
    pid: int
    directory: int
    address: int
    flags: int
    mode: int


class Opener:
    """Answers the opens of one worker until it has ended. For the event loop's thread.

    listener: from `confine`, ours from now on. pid: the worker's. domains: its guest's. own: its
    directories. has: its guest's images, as they were found before. images: asked again for a name
    that is nothing else.
    """

    def __init__(
        self,
        listener: int,
        *,
        pid: int,
        domains: tuple[int, ...],
        own: frozenset[str],
        has: Mapping[str, Image],
        images: Callable[[], Awaitable[Mapping[str, Image]]],
        limit: LogLimit,
    ) -> None:
        self._listener = listener
        self._pid = pid
        self._domains = domains
        self._own = own
        self._has = has
        self._images = images
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._left, self._since = float(BURST), self._loop.time()
        self._again: asyncio.TimerHandle | None = None
        self._mutex = threading.Lock()
        self._asking: set[asyncio.Task[None]] = set()
        self._loop.add_reader(listener, self._readable)

    def close(self) -> None:
        """Answer no more: what waits fails with ENOSYS. Idempotent."""
        if self._again is not None:
            self._again.cancel()
        for task in self._asking:
            task.cancel()
        with self._mutex:
            if self._listener >= 0:
                self._loop.remove_reader(self._listener)
                os.close(self._listener)
                self._listener = -1

    # ---- What is asked ----

    def _readable(self) -> None:
        buffer = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(self._listener, _RECEIVE, buffer)
        except OSError:  # a call that was interrupted is not there any more
            poll = select.poll()
            poll.register(self._listener, 0)
            if poll.poll(0):  # POLLHUP: nobody is left who could ask
                self._loop.remove_reader(self._listener)
            return
        number, pid, *_, at, address, flags, mode, _, _ = _NOTIFICATION.unpack(buffer)
        directory = struct.unpack("=i", struct.pack("=I", at & 0xFFFFFFFF))[0]
        call = _Call(number, pid, directory, address, flags & 0xFFFFFFFF, mode & 0o777)
        try:
            self._decide(call, self._path_of(call), again=False)
        except OSError as error:
            self._refuse(call, error.errno or errno.EIO)
        self._slow_down()

    def _slow_down(self) -> None:
        """Let a worker that asks without end wait: others are served meanwhile."""
        now = self._loop.time()
        self._left = min(BURST, self._left + (now - self._since) * RATE) - 1
        self._since = now
        if self._left < 0:
            self._loop.remove_reader(self._listener)
            self._again = self._loop.call_later(-self._left / RATE, self._go_on)

    def _go_on(self) -> None:
        if self._listener >= 0:
            self._loop.add_reader(self._listener, self._readable)

    def _decide(self, call: _Call, path: str, *, again: bool) -> None:
        """Decide by the images that are known. again: these are as they are now."""
        decision = reach.decide(path, call.flags, pid=self._pid, own=self._own, images=self._has)
        if decision.way is Way.LEAVE:
            self._answer(call, 0, _CONTINUE)
        elif decision.way is Way.REFUSE and not again:
            task = self._loop.create_task(self._ask(call, path))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        elif decision.way is Way.REFUSE:
            if self._limit.admit(logger, logging.WARNING, _REFUSED):
                logger.warning(_REFUSED, ", ".join(map(str, self._domains)), path)
            self._refuse(call, decision.error)
        elif decision.way is Way.HAND_OVER and path.startswith("/") and not _is_quick(path):
            # Storage may hang; it costs this worker the call, and nobody else anything.
            thread = threading.Thread(
                target=self._open, args=(call, decision, path), name="xvd-opener", daemon=True
            )
            thread.start()
        else:
            self._open(call, decision, path)

    async def _ask(self, call: _Call, path: str) -> None:
        """Decide once more, by what the guest has now."""
        self._has = await self._images()
        self._decide(call, path, again=True)

    def _path_of(self, call: _Call) -> str:
        """Read the name once, and make it one from the root. Raises OSError."""
        memory = os.open(f"/proc/{call.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Not beyond the page it begins in, unless it goes on there: the next may not be mapped.
            name = os.pread(memory, _PATH_MAX - call.address % _PATH_MAX, call.address)
            if b"\0" not in name:
                name += os.pread(memory, _PATH_MAX, call.address + len(name))
        finally:
            os.close(memory)
        fcntl.ioctl(self._listener, _STILL_THERE, struct.pack("=Q", call.number))  # it was its own
        text, end, _ = name.partition(b"\0")
        if not end or len(text) >= _PATH_MAX:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        path = os.fsdecode(text)
        if not path:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        if not path.startswith("/"):
            at = "cwd" if call.directory == _AT_FDCWD else f"fd/{call.directory}"
            path = f"{os.readlink(f'/proc/{self._pid}/{at}')}/{path}"
        if ".." in path.split("/"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return os.path.normpath(path)

    # ---- What is answered ----

    def _open(self, call: _Call, decision: Decision, path: str) -> None:
        """Open it and hand it over. Any thread."""
        try:
            fd = self._opened(call, decision, path)
        except OSError as error:
            self._refuse(call, error.errno or errno.EIO)
            return
        try:
            close_on_exec = call.flags & os.O_CLOEXEC
            added = _DESCRIPTOR.pack(call.number, _AND_ANSWER, fd, 0, close_on_exec)
            with self._mutex:
                fcntl.ioctl(self._listener, _ADD_FD, added)
        except OSError as error:  # it has ended meanwhile, or has too many
            self._refuse(call, error.errno or errno.EIO)
        finally:
            os.close(fd)

    def _opened(self, call: _Call, decision: Decision, path: str) -> int:
        flags = call.flags & _KEPT_FLAGS | os.O_CLOEXEC
        if flags & os.O_PATH:  # such a one cannot be handed over
            flags = flags & ~os.O_PATH & ~os.O_ACCMODE | os.O_RDONLY | os.O_NONBLOCK
        number = reach.reopened(path)
        if number is not None:
            return self._open_again(number, flags)
        fd = os.open(decision.path, flags, call.mode)
        try:
            if decision.way is Way.HAND_PUBLIC and not os.fstat(fd).st_mode & stat.S_IROTH:
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            if decision.way is Way.HAND_EVTCHN:
                self._restrict(fd)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _restrict(self, fd: int) -> None:
        """Let a descriptor bind to its guest's domain only. There is one for each port; of a guest
        that moves between two domains it is not known for which. Linux does not restrict to 0."""
        if len(self._domains) == 1 and self._domains != (0,):
            fcntl.ioctl(fd, _RESTRICT_DOMID, struct.pack("=H", self._domains[0]))

    def _open_again(self, number: int, flags: int) -> int:
        """Open a descriptor's file once more, for no more than the worker has it open for.

        By a copy of the descriptor: the worker may put another in its place at any time.
        """
        ours = _copy_of(self._pid, number)
        try:
            has, wanted = fcntl.fcntl(ours, fcntl.F_GETFL), flags & os.O_ACCMODE
            if has & os.O_PATH or has & os.O_ACCMODE not in (os.O_RDWR, wanted):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            return os.open(f"/proc/self/fd/{ours}", flags)
        finally:
            os.close(ours)

    def _refuse(self, call: _Call, number: int) -> None:
        self._answer(call, -number, 0)

    def _answer(self, call: _Call, error: int, flags: int) -> None:
        with self._mutex, contextlib.suppress(OSError):
            fcntl.ioctl(self._listener, _SEND, _ANSWER.pack(call.number, 0, error, flags))


def _copy_of(pid: int, number: int) -> int:
    """Return a copy of another process's descriptor (pidfd_getfd(2), Linux 5.6); raises OSError."""
    pidfd = os.pidfd_open(pid)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        fd = int(libc.syscall(_PIDFD_GETFD, pidfd, number, 0))
        if fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return fd
    finally:
        os.close(pidfd)


def _is_quick(path: str) -> bool:
    """Whether opening it can wait for nothing."""
    return reach.reopened(path) is None and path.startswith(_QUICK)
