# SPDX-License-Identifier: Apache-2.0
"""The wire format of blkif: every struct once, every constant once.

The one idea: the ABIs of blkif differ only in how far a 64-bit field is aligned, so a struct is a
list of fields, an ABI is one number, and every offset is computed. `messages` packs by these
offsets and ``tools/gen_abi.py`` prints the same offsets as the C header of the data plane.

Field and constant names are those of Xen's ``public/io/blkif.h``, ``ring.h`` and ``xenbus.h``.
"""

import platform
import sys
from dataclasses import dataclass
from enum import Enum, IntEnum, IntFlag
from functools import cache
from typing import Final, Self

from xvd.types import PAGE_SIZE, RING_SECTOR_SIZE

__all__ = [
    "DISCARD",
    "INDIRECT",
    "MAX_INDIRECT_PAGES_PER_REQUEST",
    "MAX_INDIRECT_SEGMENTS",
    "MAX_SEGMENTS_PER_REQUEST",
    "OTHER",
    "REQUEST",
    "RESPONSE",
    "RING_HEADER_SIZE",
    "SECTORS_PER_PAGE",
    "SEGMENT",
    "SEGMENTS_PER_INDIRECT_PAGE",
    "SRING_INSTANCE",
    "SRING_REQ_EVENT",
    "SRING_REQ_PROD",
    "SRING_RSP_EVENT",
    "SRING_RSP_PROD",
    "Abi",
    "DiscardFlag",
    "Field",
    "InfoFlag",
    "Op",
    "Status",
    "Struct",
    "XenbusState",
    "nr_ents",
]


class Op(IntEnum):
    """What a request asks for (blkif.h: ``BLKIF_OP_*``). Any other number is unknown."""

    READ = 0
    WRITE = 1
    WRITE_BARRIER = 2
    FLUSH_DISKCACHE = 3
    RESERVED_1 = 4
    """Once a SCSI passthrough of one vendor; every peer of today treats it as unknown."""
    DISCARD = 5
    INDIRECT = 6


class Status(IntEnum):
    """How a request ended (blkif.h: ``BLKIF_RSP_*``); a signed 16-bit number on the wire."""

    OKAY = 0
    ERROR = -1
    EOPNOTSUPP = -2


class InfoFlag(IntFlag):
    """The bits of the backend's ``info`` node (blkif.h: ``VDISK_*``)."""

    CDROM = 1
    REMOVABLE = 2
    READONLY = 4


class DiscardFlag(IntFlag):
    """The bits of a discard's ``flag`` byte (blkif.h: ``BLKIF_DISCARD_*``)."""

    SECURE = 1


class XenbusState(IntEnum):
    """The value of a ``state`` node (xenbus.h); a missing node reads as UNKNOWN."""

    UNKNOWN = 0
    INITIALISING = 1
    INIT_WAIT = 2
    INITIALISED = 3
    CONNECTED = 4
    CLOSING = 5
    CLOSED = 6
    RECONFIGURING = 7
    RECONFIGURED = 8


MAX_SEGMENTS_PER_REQUEST: Final = 11
"""Segments that a direct request has room for: 44 KiB of data."""

SEGMENTS_PER_INDIRECT_PAGE: Final = PAGE_SIZE // 8
"""Segments that one indirect page has room for: 512."""

MAX_INDIRECT_PAGES_PER_REQUEST: Final = 8
"""Indirect pages that one request can name."""

MAX_INDIRECT_SEGMENTS: Final = SEGMENTS_PER_INDIRECT_PAGE * MAX_INDIRECT_PAGES_PER_REQUEST
"""Segments of the largest request that can be written down: 4096, or 16 MiB."""

SECTORS_PER_PAGE: Final = PAGE_SIZE // RING_SECTOR_SIZE
"""512-byte sectors in a page; ``first_sect`` and ``last_sect`` lie in 0..7."""

RING_HEADER_SIZE: Final = 64
"""Bytes before slot 0, on the first ring page only (ring.h)."""

SRING_REQ_PROD: Final = 0
SRING_REQ_EVENT: Final = 4
SRING_RSP_PROD: Final = 8
SRING_RSP_EVENT: Final = 12
SRING_INSTANCE: Final = 24
"""Where xvd's backend numbers a ring's instance, 8 bytes: in the padding that a frontend clears
when it makes a ring (ring.h, SHARED_RING_INIT), and that nobody reads."""


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a wire struct: an unsigned integer of `size` bytes, or a struct, `count` times.

    The only signed field of blkif is the response's ``status``.
    """

    name: str
    size: "int | Struct"
    count: int = 1


@dataclass(frozen=True, slots=True)
class Struct:
    """A wire struct as its fields in order; `minimum_size` covers explicit padding at the end."""

    name: str
    fields: tuple[Field, ...]
    minimum_size: int = 0


SEGMENT: Final = Struct(
    "segment", (Field("gref", 4), Field("first_sect", 1), Field("last_sect", 1))
)

REQUEST: Final = Struct(
    "request",
    (
        Field("operation", 1),
        Field("nr_segments", 1),
        Field("handle", 2),
        Field("id", 8),
        Field("sector_number", 8),
        Field("seg", SEGMENT, MAX_SEGMENTS_PER_REQUEST),
    ),
)

DISCARD: Final = Struct(
    "discard",
    (
        Field("operation", 1),
        Field("flag", 1),
        Field("handle", 2),
        Field("id", 8),
        Field("sector_number", 8),
        Field("nr_sectors", 8),
    ),
)

INDIRECT: Final = Struct(
    "indirect",
    (
        Field("operation", 1),
        Field("indirect_op", 1),
        Field("nr_segments", 2),
        Field("id", 8),
        Field("sector_number", 8),
        Field("handle", 2),
        Field("indirect_grefs", 4, MAX_INDIRECT_PAGES_PER_REQUEST),
    ),
    # blkif.h pads the 32-bit x86 form by hand so that every ABI has 64 bytes.
    minimum_size=64,
)

OTHER: Final = Struct(
    "other",
    # The smallest request form: of an unknown operation only these two may be interpreted.
    (Field("operation", 1), Field("reserved", 1), Field("handle", 2), Field("id", 8)),
)

RESPONSE: Final = Struct("response", (Field("id", 8), Field("operation", 1), Field("status", 2)))


def _round_up(offset: int, alignment: int) -> int:
    return (offset + alignment - 1) // alignment * alignment


@cache
def _lay_out(struct: Struct, alignment: int) -> tuple[dict[str, int], int, int]:
    """Offsets by name, size and alignment of `struct` where nothing aligns beyond `alignment`."""
    offsets: dict[str, int] = {}
    end = 0
    struct_alignment = 1
    for field in struct.fields:
        if isinstance(field.size, Struct):
            _, size, field_alignment = _lay_out(field.size, alignment)
        else:
            size, field_alignment = field.size, min(field.size, alignment)
        offsets[field.name] = _round_up(end, field_alignment)
        end = offsets[field.name] + size * field.count
        struct_alignment = max(struct_alignment, field_alignment)
    return offsets, max(_round_up(end, struct_alignment), struct.minimum_size), struct_alignment


class Abi(Enum):
    """One memory layout of blkif; the value is the string of the ``protocol`` node.

    `number` is its place in the generated header (``enum blkif_abi``); `alignment` is the one
    number that tells ABIs apart: how many bytes a 64-bit field is aligned to.
    """

    X86_64 = ("x86_64-abi", 0, 8)
    X86_32 = ("x86_32-abi", 1, 4)
    ARM = ("arm-abi", 2, 8)

    protocol: str
    number: int
    alignment: int

    def __new__(cls, protocol: str, number: int, alignment: int) -> Self:
        """Keep the string as the value, so that ``Abi("x86_64-abi")`` works."""
        member = object.__new__(cls)
        member._value_ = protocol
        member.protocol = protocol
        member.number = number
        member.alignment = alignment
        return member

    def offset(self, struct: Struct, field: str) -> int:
        """Bytes from the start of `struct` to `field`; KeyError for a field it does not have."""
        return _lay_out(struct, self.alignment)[0][field]

    def size(self, struct: Struct) -> int:
        """Bytes of `struct` with the padding at its end, as a C compiler would say."""
        return _lay_out(struct, self.alignment)[1]

    @property
    def entry_size(self) -> int:
        """Bytes from one ring slot to the next: 112, or 108 for x86_32."""
        return max(self.size(struct) for struct in (REQUEST, DISCARD, INDIRECT, OTHER, RESPONSE))

    @classmethod
    def from_protocol(cls, protocol: str) -> Self:
        """The ABI that a ``protocol`` node names; ValueError for a string that no ABI has."""
        try:
            return cls(protocol)  # type: ignore[call-arg]  # by value; mypy reads __new__
        except ValueError:
            known = ", ".join(abi.protocol for abi in cls)
            raise ValueError(f"unknown ABI {protocol!r}; known are {known}") from None

    @classmethod
    def native(cls, machine: str | None = None, pointer_bits: int | None = None) -> "Abi":
        """The ABI of this process, or of `machine` (as ``uname -m`` spells it).

        Everything that is neither x86 form has ARM's layout name, as blkif.h knows no other.
        """
        machine = platform.machine() if machine is None else machine
        if pointer_bits is None:
            pointer_bits = 64 if sys.maxsize > 2**32 else 32
        if machine in ("x86_64", "amd64", "AMD64"):
            # A 32-bit process under a 64-bit kernel has 32-bit structs.
            return cls.X86_64 if pointer_bits == 64 else cls.X86_32
        if machine in ("i386", "i486", "i586", "i686", "x86"):
            return cls.X86_32
        return cls.ARM


def nr_ents(pages: int, abi: Abi) -> int:
    """Slots of a ring of `pages` pages: the largest power of two that fits after the header.

    ValueError for less than one page. Source: ``__RING_SIZE`` of Xen's ring.h.
    """
    if pages < 1:
        raise ValueError(f"a ring has at least one page, not {pages}")
    room = (pages * PAGE_SIZE - RING_HEADER_SIZE) // abi.entry_size
    return 1 << (room.bit_length() - 1)
