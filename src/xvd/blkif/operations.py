# SPDX-License-Identifier: Apache-2.0
"""Every operation of a request, one row each: what is in its slot, what it moves, what it asks for.

The one idea: whoever serves, sends or counts an operation looks its row up, so a new operation is a
new row. ``tools/gen_abi.py`` prints the rows as a C table for the data plane.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from xvd.blkif.abi import Op
from xvd.types import EngineOp

__all__ = [
    "ALWAYS_OFFERED",
    "OFFERED_BY",
    "OFFER_SECURE",
    "OPERATIONS",
    "ROW_OF",
    "Data",
    "Kind",
    "Operation",
    "Shape",
]


class Shape(IntEnum):
    """Which of the wire structs a request's slot is."""

    NONE = 0
    """Nobody knows: only its id is believed."""
    RW = 1
    DISCARD = 2
    INDIRECT = 3


class Data(IntEnum):
    """Which way the data of an operation goes."""

    NONE = 0
    FROM_DISK = 1
    TO_DISK = 2


class Kind(IntEnum):
    """As what an operation is counted, in numbers and in latencies: blkback's four kinds."""

    READ = 0
    WRITE = 1
    FLUSH = 2
    DISCARD = 3


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of blkif.h.

    data: which way its segments are copied. divisible: it always has data, of any length: it may be
    cut, joined to a neighbour, and put into an indirect request. asked: what the storage is asked,
    in this order; of one without data only the first. feature: the backend's node that offers it;
    empty where nobody has to offer it, and nobody can withdraw it.
    """

    op: Op
    shape: Shape
    kind: Kind
    data: Data = Data.NONE
    divisible: bool = False
    feature: str = ""
    asked: tuple[EngineOp, ...] = ()


_READ, _WRITE, _FLUSH, _DISCARD = EngineOp

OPERATIONS: Final = (
    Operation(
        Op.READ, Shape.RW, Kind.READ, Data.FROM_DISK, divisible=True, asked=(_READ,)
    ),
    Operation(
        Op.WRITE, Shape.RW, Kind.WRITE, Data.TO_DISK, divisible=True, asked=(_WRITE,)
    ),
    # What was written before is durable first, then its own data is, and then it is answered.
    Operation(
        Op.WRITE_BARRIER, Shape.RW, Kind.FLUSH, Data.TO_DISK,
        feature="feature-barrier", asked=(_FLUSH, _WRITE, _FLUSH),
    ),
    Operation(
        Op.FLUSH_DISKCACHE, Shape.RW, Kind.FLUSH, Data.TO_DISK,
        feature="feature-flush-cache", asked=(_FLUSH, _WRITE),
    ),
    Operation(
        Op.DISCARD, Shape.DISCARD, Kind.DISCARD,
        feature="feature-discard", asked=(_DISCARD,),
    ),
    # Stands for the operation inside it, which is what is counted, asked and answered.
    Operation(
        Op.INDIRECT, Shape.INDIRECT, Kind.READ, feature="feature-max-indirect-segments"
    ),
)  # fmt: skip
"""By number; RESERVED_1 has no row, and is as unknown as any number that blkif.h does not have."""

ROW_OF: Final = {row.op: row for row in OPERATIONS}

OFFER_SECURE: Final = 1 << 16
"""Among the bits ``1 << op`` of what a backend offers: a discard may ask for secure erase."""

OFFERED_BY: Final = {row.feature: 1 << row.op for row in OPERATIONS if row.feature} | {
    "discard-secure": OFFER_SECURE
}
"""The bit of what each of the backend's nodes offers."""

ALWAYS_OFFERED: Final = sum(1 << row.op for row in OPERATIONS if not row.feature)
"""The bits of what every backend serves."""
