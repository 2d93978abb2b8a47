# SPDX-License-Identifier: Apache-2.0
"""Which system calls a worker has: a table, by what they are for.

Whatever is not here fails with EPERM: a new process or program, a socket, a signal to another
process, tracing, mounts, namespaces, modules, keys, another user.
"""

import socket
import termios
from typing import Final

from xvd.service.sandbox.seccomp import Argument, Comparison, Rule

_CLONE_THREAD: Final = 0x00010000
_PR_SET_NAME: Final = 15

_ANY: Final[dict[str, str]] = {
    "data of open files": (
        "read pread64 readv preadv preadv2 write pwrite64 writev pwritev pwritev2 lseek fsync "
        "fdatasync sync_file_range fallocate ftruncate close close_range dup dup2 dup3 fcntl flock"
    ),
    "what a file is": (
        "stat fstat lstat newfstatat statx fstatfs statfs readlink readlinkat access faccessat "
        "faccessat2 getdents64 getcwd"
    ),
    "names in its own directories": "rename renameat renameat2 unlink unlinkat umask fchmod",
    "memory": "mmap munmap mremap mprotect madvise brk memfd_create mincore membarrier",
    "threads": (
        "futex futex_waitv set_robust_list get_robust_list rseq set_tid_address gettid getpid "
        "getppid exit exit_group sched_yield sched_getaffinity sched_setaffinity sched_getparam "
        "sched_getscheduler getcpu restart_syscall arch_prctl"
    ),
    "signals to itself": (
        "rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait sigaltstack"
    ),
    "waiting": (
        "epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 poll ppoll select pselect6 "
        "eventfd2 timerfd_create timerfd_settime pipe2 nanosleep clock_nanosleep clock_gettime "
        "clock_getres gettimeofday time"
    ),
    "io_uring": "io_uring_enter",
    "sockets that it was given": (
        "sendmsg sendto recvmsg recvfrom shutdown getsockopt setsockopt getsockname getpeername"
    ),
    "what it is, and how much it has": (
        "uname sysinfo getrusage getuid geteuid getgid getegid getrandom getrlimit"
    ),
}

_DRIVERS: Final = (0x12, ord("E"), ord("G"))
"""Types of ioctl: block devices (linux/fs.h), Xen's event channels, and its grants."""
_LOOP_GET_STATUS64: Final = 0x4C05
_FIONBIO, _FIOCLEX, _FIONCLEX = 0x5421, 0x5451, 0x5450

_TYPE_MASK: Final = 0xF
"""Of a socket's type; above it are flags (linux/net.h: SOCK_TYPE_MASK)."""

_SOME: Final[dict[str, tuple[Rule, ...]]] = {
    "clone": ((Argument(0, Comparison.MASKED_EQ, _CLONE_THREAD, _CLONE_THREAD),),),
    # Of streams only: by a socket for datagrams it could write to any socket with a name, and so to
    # the host's log.
    "socketpair": (
        (
            Argument(0, Comparison.EQ, socket.AF_UNIX),
            Argument(1, Comparison.MASKED_EQ, _TYPE_MASK, socket.SOCK_STREAM),
        ),
    ),
    "prctl": ((Argument(0, Comparison.EQ, _PR_SET_NAME),),),
    "prlimit64": ((Argument(2, Comparison.EQ, 0),),),
    "ioctl": (
        *((Argument(1, Comparison.MASKED_EQ, 0xFF00, kind << 8),) for kind in _DRIVERS),
        *(
            (Argument(1, Comparison.EQ, number),)
            for number in (_LOOP_GET_STATUS64, _FIONBIO, _FIOCLEX, _FIONCLEX, termios.TCGETS)
        ),
    ),
}

ALLOWED: Final[dict[str, tuple[Rule, ...]]] = {
    name: () for names in _ANY.values() for name in names.split()
} | _SOME
"""Each call, and the rules of which one must hold; none: whatever its arguments are."""

NOTIFIED: Final = ("openat", "io_uring_setup")
"""Calls that the supervisor does, or lets be done, or refuses (opener.py)."""

MISSING: Final = ("clone3", "openat2")
"""Calls whose arguments a filter cannot see; the C library has others instead."""
