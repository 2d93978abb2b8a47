# SPDX-License-Identifier: Apache-2.0
"""Which files a worker may open, and how: a decision by name and flags, without any I/O.

The worker may be its guest's by now. So it never gets more than a worker needs: the images of its
guest, what the whole host may read of the system, its own directories, and Xen's devices.
"""

import errno
import os
import re
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import PurePosixPath
from typing import Final

from xvd.machine.xen.here import EVTCHN, GNTDEV


class Way(Enum):
    """How an open goes on."""

    HAND_OVER = auto()
    """The supervisor opens it, whatever the worker itself may."""
    HAND_PUBLIC = auto()
    """The same, if everybody may read the file."""
    HAND_EVTCHN = auto()
    """The same, restricted to the guest's own domain."""
    LEAVE = auto()
    """The kernel decides by what the worker itself may."""
    REFUSE = auto()


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of an open. path: what to open in the supervisor. error: of a refusal."""

    way: Way
    path: str = ""
    error: int = errno.EACCES


@dataclass(frozen=True, slots=True)
class Image:
    """How a guest's worker may open a file. made: it may also make it."""

    writable: bool
    made: bool = False


_WRITES: Final = os.O_CREAT | os.O_TRUNC | os.O_APPEND | (os.O_TMPFILE & ~os.O_DIRECTORY)
"""Flags that change a file by opening it, or how it is written."""
_ACCESS: Final = os.O_ACCMODE

_OWN_PROC: Final = re.compile(
    r"/proc/(self|thread-self)/(fd/[0-9]+|fd|maps|cgroup|mountinfo|status|stat|task)"
)
_FD: Final = re.compile(r"/proc/self/fd/([0-9]+)")
_PUBLIC: Final = re.compile(
    r"/proc|/proc/(swaps|meminfo|stat|cpuinfo|mounts|[0-9]+/comm|sys/(vm|kernel)/.*)|/sys(/.*)?"
    r"|/usr/.*|/lib[^/]*/.*|/etc/(ld\.so\.cache|localtime|ceph/.*)"
)
_DEVICES: Final = {
    "/dev/null": Way.HAND_OVER,
    "/dev/zero": Way.HAND_OVER,
    "/dev/urandom": Way.HAND_OVER,
    "/proc/pressure/memory": Way.HAND_OVER,
    GNTDEV: Way.HAND_OVER,
    EVTCHN: Way.HAND_EVTCHN,
}
_PROGRAM: Final = tuple(
    {
        os.path.realpath(path)
        for path in (sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *sys.path)
        if path
    }
)
"""Where Python and its modules are."""


def decide(
    path: str, flags: int, *, pid: int, own: frozenset[str], images: Mapping[str, Image]
) -> Decision:
    """Decide on an open of a path from the root, without ``..``.

    pid: the worker's. own: its directories. images: its guest's.
    """
    if str(PurePosixPath(path).parent) in own or path in own:
        return Decision(Way.LEAVE)
    if image := images.get(path):
        allowed = os.O_CREAT if image.made else 0
        if flags & _WRITES & ~allowed or (flags & _ACCESS != os.O_RDONLY and not image.writable):
            return Decision(Way.REFUSE)
        return Decision(Way.HAND_OVER, path)
    if flags & _WRITES:
        return Decision(Way.REFUSE)
    if path in _DEVICES:
        return Decision(_DEVICES[path], path)
    if _OWN_PROC.fullmatch(path):
        rest = path.split("/", 3)[3]
        return Decision(Way.HAND_OVER, f"/proc/{pid}/{rest}")
    if flags & _ACCESS == os.O_RDONLY and (_PUBLIC.fullmatch(path) or path.startswith(_PROGRAM)):
        return Decision(Way.HAND_PUBLIC, path)
    return Decision(Way.REFUSE)


def reopened(path: str) -> int | None:
    """Return the number of the descriptor whose file a path of the worker's names, if it does."""
    found = _FD.fullmatch(path)
    return int(found[1]) if found else None
