# SPDX-License-Identifier: Apache-2.0
"""System calls that the C library has no function for."""

import ctypes
import os


def call(what: str, number: int, *arguments: object) -> int:
    """Make a system call by its number; its result. Raises OSError, whose text begins with what."""
    result = int(ctypes.CDLL(None, use_errno=True).syscall(number, *arguments))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result
