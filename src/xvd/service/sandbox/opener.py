# SPDX-License-Identifier: Apache-2.0
"""Opens files for a confined worker: it calls openat(2) as ever, and gets what it may have.

The kernel stops the worker in the call and tells us. We read the name once from its memory, decide
by our copy, open the file ourselves, and put the descriptor into the worker. So a name that changes
meanwhile changes nothing.

Each worker has a thread here that answers it. All that a worker can make hang, as a name in memory
that lies on storage, hangs this thread.
"""

import asyncio
import errno
import fcntl
import logging
import os
import stat
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from xvd.loglimit import LogLimit
from xvd.service.sandbox import reach, rings
from xvd.service.sandbox.notify import Call, Calls, copy_of
from xvd.service.sandbox.reach import Decision, Image, Way

logger = logging.getLogger(__name__)

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


class Opener:
    """Answers the calls of one worker until it has ended, in a thread of its own.

    To be made and closed in the event loop's thread. listener: from `confine`, ours from now on.
    pid: the worker's. domains: its guest's. own: its directories. has: its guest's images, as they
    were found before, and `withdrawals` then returned `withdrawn`. images: asked again for a name
    that is nothing else, and where that number is another one by now.
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
        withdrawals: Callable[[], int],
        withdrawn: int,
        limit: LogLimit,
    ) -> None:
        self._calls = Calls(listener)
        self._pid = pid
        self._domains = domains
        self._own = own
        self._has = has
        self._images = images
        self._withdrawals = withdrawals
        self._withdrawn = withdrawn
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._run, name="xvd-opener", daemon=True).start()

    def close(self) -> None:
        """Answer no more; what the thread does just now it does to the end."""
        self._calls.ring()

    # ---- The thread ----

    def _run(self) -> None:
        left, since = float(BURST), time.monotonic()
        while call := self._calls.next():
            try:
                if call.name == rings.SETUP:
                    self._make_ring(call)
                else:
                    self._decide(call, self._path_of(call))
            except OSError as error:
                self._calls.refuse(call, error.errno or errno.EIO)
            now = time.monotonic()
            left, since = min(BURST, left + (now - since) * RATE) - 1, now
            if left < 0:
                time.sleep(-left / RATE)
        self._calls.close()

    def _make_ring(self, call: Call) -> None:
        entries, address = call.arguments[:2]
        memory = os.open(f"/proc/{call.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        try:
            parameters = bytearray(os.pread(memory, rings.PARAMETERS, address))
            self._calls.check(call)
            if len(parameters) != rings.PARAMETERS:
                raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
            ring = rings.make_ring(entries & 0xFFFFFFFF, parameters)
            try:
                os.pwrite(memory, parameters, address)
                self._calls.hand_over(call, ring, close_on_exec=True)
            finally:
                os.close(ring)
        finally:
            os.close(memory)

    def _decide(self, call: Call, path: str) -> None:
        flags = call.arguments[2] & 0xFFFFFFFF
        decision = self._decided(path, flags)
        old = path in self._has and self._withdrawn != self._withdrawals()
        if old or decision.way is Way.REFUSE:
            self._withdrawn = self._withdrawals()
            self._has = asyncio.run_coroutine_threadsafe(self._ask(), self._loop).result()
            decision = self._decided(path, flags)
        if decision.way is Way.LEAVE:
            self._calls.let(call)
        elif decision.way is Way.REFUSE:
            if self._limit.admit(logger, logging.WARNING, _REFUSED):
                logger.warning(_REFUSED, ", ".join(map(str, self._domains)), path)
            self._calls.refuse(call, decision.error)
        elif reach.reopened(path) is None and path.startswith(_QUICK):
            self._open(call, decision, path)
        else:  # storage may hang, and the worker has other storage
            threading.Thread(
                target=self._open, args=(call, decision, path), name="xvd-opener", daemon=True
            ).start()

    def _decided(self, path: str, flags: int) -> Decision:
        return reach.decide(path, flags, pid=self._pid, own=self._own, images=self._has)

    async def _ask(self) -> Mapping[str, Image]:
        return await self._images()

    def _path_of(self, call: Call) -> str:
        """Read the name once, and make it one from the root. Raises OSError."""
        address = call.arguments[1]
        memory = os.open(f"/proc/{call.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Not beyond the page it begins in, unless it goes on there: the next may not be mapped.
            name = os.pread(memory, _PATH_MAX - address % _PATH_MAX, address)
            if b"\0" not in name:
                name += os.pread(memory, _PATH_MAX, address + len(name))
        finally:
            os.close(memory)
        self._calls.check(call)
        text, end, _ = name.partition(b"\0")
        if not end or len(text) >= _PATH_MAX:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        path = os.fsdecode(text)
        if not path:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        if not path.startswith("/"):
            (directory,) = struct.unpack("=i", struct.pack("=I", call.arguments[0] & 0xFFFFFFFF))
            at = "cwd" if directory == _AT_FDCWD else f"fd/{directory}"
            path = f"{os.readlink(f'/proc/{self._pid}/{at}')}/{path}"
        if ".." in path.split("/"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return os.path.normpath(path)

    def _open(self, call: Call, decision: Decision, path: str) -> None:
        """Open it and hand it over. Any thread."""
        flags, mode = call.arguments[2:4]
        try:
            fd = self._opened(decision, path, flags, mode & 0o777)
        except OSError as error:
            self._calls.refuse(call, error.errno or errno.EIO)
            return
        try:
            self._calls.hand_over(call, fd, close_on_exec=bool(flags & os.O_CLOEXEC))
        finally:
            os.close(fd)

    def _opened(self, decision: Decision, path: str, flags: int, mode: int) -> int:
        flags = flags & _KEPT_FLAGS | os.O_CLOEXEC
        if flags & os.O_PATH:  # such a one cannot be handed over
            flags = flags & ~os.O_PATH & ~os.O_ACCMODE | os.O_RDONLY | os.O_NONBLOCK
        number = reach.reopened(path)
        if number is not None:
            return self._open_again(number, flags)
        fd = os.open(decision.path, flags, mode)
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
        ours = copy_of(self._pid, number)
        try:
            has, wanted = fcntl.fcntl(ours, fcntl.F_GETFL), flags & os.O_ACCMODE
            if has & os.O_PATH or has & os.O_ACCMODE not in (os.O_RDWR, wanted):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))
            return os.open(f"/proc/self/fd/{ours}", flags)
        finally:
            os.close(ours)
