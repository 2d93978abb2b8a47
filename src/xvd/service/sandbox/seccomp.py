# SPDX-License-Identifier: Apache-2.0
"""A filter of system calls, by libseccomp: what is not allowed fails with EPERM, and some are
answered by another process (seccomp_unotify(2))."""

import ctypes
import errno
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from xvd.errors import ConfigError
from xvd.service.sandbox import kernel

_ALLOW: Final = 0x7FFF0000
_NOTIFY: Final = 0x7FC00000
_ERRNO: Final = 0x00050000
_SET_MODE_FILTER: Final = 1
_NEW_LISTENER: Final = 8


class Comparison(IntEnum):
    """How an argument is compared (seccomp.h: enum scmp_compare)."""

    EQ = 4
    MASKED_EQ = 7


@dataclass(frozen=True, slots=True)
class Argument:
    """The argument of this number compares so. For `MASKED_EQ` a is the mask
    and b what is left of the argument."""

    number: int
    comparison: Comparison
    a: int
    b: int = 0


Rule = tuple[Argument, ...]
"""What a call's arguments must be, all of it."""


class _Compare(ctypes.Structure):
    _fields_ = (
        ("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)
    )  # fmt: skip


def library() -> ctypes.CDLL:
    """Load libseccomp; `ConfigError` if it is not here."""
    try:
        found = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        raise ConfigError(
            "no libseccomp, which confines a guest's process: on Debian, apt-get install "
            "libseccomp2; or say --isolation process"
        ) from None
    found.seccomp_init.restype = ctypes.c_void_p
    return found


def compile_filter(
    allowed: Mapping[str, Sequence[Rule]], notified: Iterable[str], missing: Iterable[str]
) -> bytes:
    """Return the program of a filter, for `install`: it takes milliseconds to make.

    allowed: each call, and rules of which one must hold; none: whatever its arguments are. A
    name that this architecture has not is left out. missing: calls that fail with ENOSYS, for
    callers that know another way. Raises `ConfigError` without libseccomp, and OSError.
    """
    seccomp = library()
    context = ctypes.c_void_p(seccomp.seccomp_init(_ERRNO | errno.EPERM))
    program = os.memfd_create("xvd-seccomp", os.MFD_CLOEXEC)
    try:
        rules: list[tuple[int, str, Rule]] = [
            (_ALLOW, name, rule) for name, each in allowed.items() for rule in each or ((),)
        ]
        rules += [(_NOTIFY, name, ()) for name in notified]
        rules += [(_ERRNO | errno.ENOSYS, name, ()) for name in missing]
        for action, name, rule in rules:
            number = seccomp.seccomp_syscall_resolve_name(name.encode())
            if number < 0:
                continue
            compared = [_Compare(one.number, one.comparison, one.a, one.b) for one in rule]
            array = (_Compare * len(compared))(*compared)
            _check(
                seccomp.seccomp_rule_add_array(
                    context, ctypes.c_uint32(action), number, len(compared), array
                )
            )
        _check(seccomp.seccomp_export_bpf(context, program))
        return os.pread(program, os.fstat(program).st_size, 0)
    finally:
        seccomp.seccomp_release(context)
        os.close(program)


def install(program: bytes) -> int:
    """Filter this thread's system calls by a program, and those of what it starts, for good.

    no_new_privs must be set. Returns the descriptor on which the notified calls are to be answered.
    Raises OSError where the kernel refuses.
    """
    number = library().seccomp_syscall_resolve_name(b"seccomp")
    content = ctypes.create_string_buffer(program, len(program))
    # linux/filter.h: struct sock_fprog, of instructions of eight bytes.
    head = struct.pack("=HxxxxxxQ", len(program) // 8, ctypes.addressof(content))
    return kernel.call("seccomp", number, _SET_MODE_FILTER, _NEW_LISTENER, head)


def _check(result: int) -> None:
    if result < 0:
        raise OSError(-result, f"seccomp: {os.strerror(-result)}")
