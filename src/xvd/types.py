# SPDX-License-Identifier: Apache-2.0
"""The integers that must not be swapped, and the page size.

Each is a distinct type to the type checker and a plain int at run time.
"""

from enum import IntEnum
from typing import Final, NewType

Domid = NewType("Domid", int)
"""A domain's number, 0 to below `DOMID_FIRST_RESERVED`."""

DOMID_FIRST_RESERVED: Final = 0x7FF0
"""From this number on there are no domains (xen.h); itself it means the caller (DOMID_SELF)."""

DOM0: Final = Domid(0)
"""The domain of the toolstack."""

Gref = NewType("Gref", int)
"""A grant reference: an index into the granting domain's table, u32; 0..7 are reserved."""

Port = NewType("Port", int)
"""An event channel's number within one domain, u32; 0 is never valid."""

RequestId = NewType("RequestId", int)
"""A ring request's id, u64, chosen by the frontend and echoed whole by the backend."""

PAGE_SIZE: Final = 4096
"""A Xen page, whatever the guest's own page size is (PROTOCOL: always 4096)."""

RING_SECTOR_SIZE: Final = 512
"""The unit of every sector field on the ring, whatever ``sector-size`` says (blkif.h)."""


class GrantStatus(IntEnum):
    """How an operation on a grant ended (grant_table.h: ``GNTST_*``)."""

    OKAY = 0
    GENERAL_ERROR = -1
    BAD_DOMAIN = -2
    BAD_GNTREF = -3
    BAD_HANDLE = -4
    BAD_VIRT_ADDR = -5
    NO_DEVICE_SPACE = -7
    PERMISSION_DENIED = -8
    BAD_PAGE = -9
    BAD_COPY_ARG = -10
    EAGAIN = -12
    NO_SPACE = -13


class EngineOp(IntEnum):
    """What storage can be asked (ports.pxd, `engine_io`)."""

    READ = 0
    WRITE = 1
    FLUSH = 2
    DISCARD = 3
