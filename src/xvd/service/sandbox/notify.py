# SPDX-License-Identifier: Apache-2.0
"""System calls of another process that wait for us to answer (seccomp_unotify(2))."""

import contextlib
import errno
import fcntl
import os
import select
import struct
import threading
from dataclasses import dataclass
from typing import Final

from xvd.service.sandbox import kernel

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


@dataclass(frozen=True, slots=True)
class Call:
    """A call that waits. number: how it is answered. pid: of the thread. name: the system call's
    own number."""

    number: int
    pid: int
    name: int
    arguments: tuple[int, ...]


class Calls:
    """The calls of one process, and of what it starts. For one thread, which closes it, but for
    `ring`, `refuse` and `hand_over`: any may call those, and when it is closed they do nothing."""

    def __init__(self, listener: int) -> None:
        self._listener = listener
        self._bell = os.eventfd(0, os.EFD_CLOEXEC)
        self._mutex = threading.Lock()

    def ring(self) -> None:
        """Let `next` end, and every later one."""
        with self._mutex:
            if self._bell >= 0:
                os.eventfd_write(self._bell, 1)

    def next(self) -> Call | None:
        """Wait for a call; None if there will be none any more."""
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._bell, select.POLLIN)
        while True:
            came = dict(poll.poll())
            if self._bell in came or came[self._listener] & select.POLLHUP:
                return None
            buffer = bytearray(_NOTIFICATION.size)
            with contextlib.suppress(OSError):  # one that was interrupted is not there any more
                fcntl.ioctl(self._listener, _RECEIVE, buffer)
                number, pid, _, name, _, _, *arguments = _NOTIFICATION.unpack(buffer)
                return Call(number, pid, name, tuple(arguments))

    def check(self, call: Call) -> None:
        """Raise OSError if a call does not wait any more: what was read by its pid since may be
        another process's."""
        fcntl.ioctl(self._listener, _STILL_THERE, struct.pack("=Q", call.number))

    def let(self, call: Call) -> None:
        """Let the kernel do it, by what the caller itself may."""
        self._answer(call, 0, _CONTINUE)

    def refuse(self, call: Call, error: int) -> None:
        """Let it fail with this errno."""
        self._answer(call, -error, 0)

    def _answer(self, call: Call, error: int, flags: int) -> None:
        with self._mutex, contextlib.suppress(OSError):  # it has ended meanwhile
            if self._listener >= 0:
                fcntl.ioctl(self._listener, _SEND, _ANSWER.pack(call.number, 0, error, flags))

    def hand_over(self, call: Call, fd: int, *, close_on_exec: bool) -> None:
        """Let its result be a copy of this descriptor."""
        flags = os.O_CLOEXEC if close_on_exec else 0
        added = _DESCRIPTOR.pack(call.number, _AND_ANSWER, fd, 0, flags)
        try:
            with self._mutex:
                if self._listener >= 0:
                    fcntl.ioctl(self._listener, _ADD_FD, added)
        except OSError as error:  # it has ended meanwhile, or has too many
            self.refuse(call, error.errno or errno.EIO)

    def close(self) -> None:
        """Answer no more: what waits fails with ENOSYS."""
        with self._mutex:
            os.close(self._listener)
            os.close(self._bell)
            self._listener = self._bell = -1


def copy_of(pid: int, number: int) -> int:
    """Return a copy of another process's descriptor (pidfd_getfd(2), Linux 5.6); raises OSError."""
    pidfd = os.pidfd_open(pid)
    try:
        return kernel.call("pidfd_getfd", _PIDFD_GETFD, pidfd, number, 0)
    finally:
        os.close(pidfd)
