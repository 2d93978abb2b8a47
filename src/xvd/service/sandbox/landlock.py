# SPDX-License-Identifier: Apache-2.0
"""Landlock: this process, and what it starts, may open no file any more but where a rule says so.

Descriptors that are open already, or come later from somebody else, work as before. Facts are of
Linux: include/uapi/linux/landlock.h, Documentation/userspace-api/landlock.rst.
"""

import os
import struct
from collections.abc import Mapping
from enum import IntFlag
from pathlib import Path
from typing import Final

from xvd.errors import ConfigError
from xvd.service.sandbox import kernel

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
"""System calls; the same numbers on every architecture."""
_ASK_VERSION: Final = 1
_PATH_BENEATH: Final = 1
_SCOPES: Final = 0b11
"""Abstract unix sockets and signals of others (ABI 6)."""
_NETWORK: Final = 0b11
"""TCP's bind and connect (ABI 4)."""


class Right(IntFlag):
    """What may be done below a directory (LANDLOCK_ACCESS_FS_*)."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15


KEEP_FILES: Final = (
    Right.READ_FILE | Right.WRITE_FILE | Right.READ_DIR | Right.MAKE_REG | Right.REMOVE_FILE
    | Right.TRUNCATE
)  # fmt: skip
"""Make files in a directory, use and remove them."""

_SINCE: Final = {1: Right.REFER, 2: Right.TRUNCATE, 4: Right.IOCTL_DEV}
"""The last ABI that does not know a right."""


def abi() -> int:
    """Return which Landlock this kernel has; 0: none."""
    try:
        return kernel.call("Landlock", _CREATE_RULESET, None, 0, _ASK_VERSION)
    except OSError:
        return 0


def restrict(allowed: Mapping[Path, Right]) -> None:
    """Deny this thread, and all that it starts, every path; allow these rights below these.

    To be called before there are threads, with no_new_privs set. TCP and, where the kernel can,
    abstract unix sockets and signals of other processes are denied too. Raises `ConfigError` where
    the kernel has no Landlock, and OSError for a directory that cannot be opened.
    """
    version = abi()
    if version == 0:
        raise ConfigError(
            "no Landlock, which confines a guest's process: take Linux 5.13 or later, with "
            "landlock among its security modules (lsm=landlock,...); or say --isolation process"
        )
    known = Right((1 << len(Right)) - 1)
    for last, right in _SINCE.items():
        if version <= last:
            known &= ~right
    attributes = [known, *[_NETWORK] * (version >= 4), *[_SCOPES] * (version >= 6)]
    packed = struct.pack(f"={len(attributes)}Q", *attributes)
    ruleset = kernel.call("Landlock", _CREATE_RULESET, packed, len(packed), 0)
    try:
        for path, rights in allowed.items():
            directory = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                rule = struct.pack("=Qi", rights & known, directory)
                kernel.call("Landlock", _ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
            finally:
                os.close(directory)
        kernel.call("Landlock", _RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
