# SPDX-License-Identifier: Apache-2.0
"""An io_uring for a confined process, with the operations that a queue uses and no others.

No filter of system calls sees what an io_uring does: it can make sockets and connect them. So the
process has its rings from us: they are made here, restricted for good, and then handed over.
"""

import ctypes
import errno
import os
import struct
from typing import Final

from xvd.service.sandbox import kernel

SETUP: Final = 425
"""io_uring_setup(2); the same number on every architecture."""
_REGISTER: Final = 427
_RESTRICTIONS: Final = 11
_ENABLE: Final = 12
"""IORING_REGISTER_RESTRICTIONS, IORING_REGISTER_ENABLE_RINGS."""
PARAMETERS: Final = 120
"""Bytes of linux/io_uring.h's struct io_uring_params."""
_FLAGS_AT: Final = 8
_CLAMP: Final = 1 << 4
_BEGINS_DISABLED: Final = 1 << 6
_WITHOUT_ARRAY: Final = 1 << 16
"""IORING_SETUP_NO_SQARRAY (Linux 6.6), which liburing 2.5 and later ask for first."""
_OPERATION, _FLAGS_ALLOWED = 1, 2
"""IORING_RESTRICTION_SQE_OP, IORING_RESTRICTION_SQE_FLAGS_ALLOWED."""

OPERATIONS: Final = {
    "READV": 1, "WRITEV": 2, "FSYNC": 3, "POLL_ADD": 6, "ASYNC_CANCEL": 14, "FALLOCATE": 17,
    "READ": 22, "WRITE": 23,
}  # fmt: skip
"""IORING_OP_*."""
_SKIP_SUCCESS: Final = 1 << 6
"""IOSQE_CQE_SKIP_SUCCESS, the only flag of an operation."""


def make_ring(entries: int, parameters: bytearray) -> int:
    """Make a ring for what another process has asked for; its descriptor is the caller's.

    parameters: what it has asked for, and then what it is to be told. Raises OSError; EINVAL for
    another kind of ring than a queue's, as a kernel that has no such kind: liburing takes that as
    a word to ask for less.
    """
    (flags,) = struct.unpack_from("=I", parameters, _FLAGS_AT)
    if flags & ~(_CLAMP | _WITHOUT_ARRAY):
        raise OSError(errno.EINVAL, "a ring of another kind than a queue's")
    struct.pack_into("=I", parameters, _FLAGS_AT, flags | _BEGINS_DISABLED)
    told = (ctypes.c_char * len(parameters)).from_buffer(parameters)
    ring = kernel.call("io_uring", SETUP, entries, told)
    struct.pack_into("=I", parameters, _FLAGS_AT, flags)
    try:
        allowed = [(_OPERATION, number) for number in OPERATIONS.values()]
        allowed.append((_FLAGS_ALLOWED, _SKIP_SUCCESS))
        packed = b"".join(struct.pack("=HBB12x", what, which, 0) for what, which in allowed)
        kernel.call("io_uring", _REGISTER, ring, _RESTRICTIONS, packed, len(allowed))
        kernel.call("io_uring", _REGISTER, ring, _ENABLE, None, 0)
    except BaseException:
        os.close(ring)
        raise
    return ring
