# SPDX-License-Identifier: Apache-2.0
"""A worker gives up what it does not need, before it looks at anything that a guest has written."""

import ctypes
import functools
import os
import resource
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xvd.service.parent import end_with_parent
from xvd.service.sandbox import landlock, seccomp
from xvd.service.sandbox.calls import ALLOWED, MISSING, NOTIFIED

USER_BASE: Final = 0x78760000
"""The user, and the group, of the process of a guest is this and its first domain's number."""

FILES_MAX: Final = 4096
MEMORY_MAX: Final = 4 << 30
"""Bytes that are its own: what it shares with its guest is not counted."""
PROCESSES_MAX: Final = 4096
"""Threads too; counted for each user. A disk has at most 1024 queues, each with a thread."""

_PR_SET_NO_NEW_PRIVS: Final = 38
_CAPABILITY_VERSION_3: Final = 0x20080522


@dataclass(frozen=True, slots=True)
class Confinement:
    """What is left to a process.

    user: its user and group; None: it stays who it is, as where this is not root. keeps: what it
    may do below which directories, by its own right.
    """

    user: int | None
    keeps: Mapping[Path, landlock.Right]


def own_user(domain: int) -> int | None:
    """Return the user of a guest's process; None where we may not become another."""
    return USER_BASE + domain if os.geteuid() == 0 else None


def check() -> None:
    """Raise `ConfigError` with the remedy where a process cannot be confined here."""
    seccomp.library()
    if landlock.abi() == 0:
        landlock.restrict({})


@functools.cache
def prepare() -> bytes:
    """Do once what every process that is to be confined needs, for those forked from this one."""
    return seccomp.compile_filter(ALLOWED, NOTIFIED, MISSING)


def confine(plan: Confinement) -> int:
    """Confine this process for good, and what it starts. It must have one thread.

    Returns the descriptor on which somebody else is to answer for `calls.NOTIFIED`; until then they
    wait. Raises `ConfigError` where the system cannot do it, and OSError where it refuses.
    """
    program = prepare()
    _gain_nothing()
    landlock.restrict(plan.keeps)
    files = min(FILES_MAX, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_MAX, MEMORY_MAX))
    if plan.user is not None:
        resource.setrlimit(resource.RLIMIT_NPROC, (PROCESSES_MAX, PROCESSES_MAX))
        os.setgroups([])
        os.setresgid(plan.user, plan.user, plan.user)
        parent = os.getppid()
        os.setresuid(plan.user, plan.user, plan.user)  # and its capabilities are gone with that
        end_with_parent(parent)  # which Linux forgets with the user
    return seccomp.install(program)


def drop_capabilities() -> None:
    """Give up every capability, and never get one again: what is left is what the user may do."""
    _gain_nothing()
    # linux/capability.h: version and process, then two times effective, permitted, inheritable.
    header, none = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), bytes(24)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(header, none) != 0:
        raise OSError(ctypes.get_errno(), "capabilities cannot be given up")


def _gain_nothing() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "no_new_privs cannot be set")
