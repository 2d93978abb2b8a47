# SPDX-License-Identifier: Apache-2.0
"""Which storage it is that a descriptor leads to, whatever its name leads to before or later.

A file is known by its file system's device number, its inode, and when that inode came to be: the
number of a removed file is given to the next one. A block device is known by its number and, from
Linux 5.15 on, by the kernel's count of the disks that it has seen (diskseq): a device's number,
too, is given to the next one.
"""

import ctypes
import fcntl
import os
import stat
import struct
from contextlib import suppress
from typing import Final

BLKGETDISKSEQ: Final = 0x80081280
_AT_EMPTY_PATH: Final = 0x1000
_STATX_BTIME: Final = 0x800
_STATX_SIZE: Final = 256
_BTIME_AT: Final = 0x50
"""Where linux/stat.h has stx_btime: seconds (s64), nanoseconds (u32)."""


def identity_of(fd: int) -> str:
    """Return one line that tells this file or block device from all others of this host."""
    found = os.fstat(fd)
    if stat.S_ISBLK(found.st_mode):
        number = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
        sequence = bytearray(8)
        with suppress(OSError):
            fcntl.ioctl(fd, BLKGETDISKSEQ, sequence)
        return f"device {number} diskseq {struct.unpack('=Q', sequence)[0]}"
    number = f"{os.major(found.st_dev)}:{os.minor(found.st_dev)}"
    return f"file {number} inode {found.st_ino} of {_birth(fd)}"


def _birth(fd: int) -> str:
    """When the inode was made, in seconds; 0 where the file system does not keep it."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    if libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_BTIME, buffer) != 0:
        return "0"
    (mask,) = struct.unpack_from("=I", buffer.raw)
    seconds, nanoseconds = struct.unpack_from("=qI", buffer.raw, _BTIME_AT)
    return f"{seconds}.{nanoseconds:09}" if mask & _STATX_BTIME else "0"
