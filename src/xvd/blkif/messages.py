# SPDX-License-Identifier: Apache-2.0
"""Requests and responses as plain values, and their bytes in every ABI.

The one idea: this is the reference, so it is written to be read. A value holds what the wire
held, judged by nobody: unpacking never fails on what a peer wrote, `validate` says what is wrong
with it. Bytes handed in must already be a private copy of the slot (XSA-155).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from xvd.blkif.abi import (
    DISCARD,
    INDIRECT,
    MAX_INDIRECT_PAGES_PER_REQUEST,
    MAX_SEGMENTS_PER_REQUEST,
    OTHER,
    REQUEST,
    RESPONSE,
    SECTORS_PER_PAGE,
    SEGMENT,
    SEGMENTS_PER_INDIRECT_PAGE,
    Abi,
    Field,
    Op,
    Status,
    Struct,
)
from xvd.errors import LocalProtocolError
from xvd.types import Gref, RequestId

__all__ = [
    "AnyRequest",
    "DiscardRequest",
    "IndirectRequest",
    "OtherRequest",
    "Request",
    "Response",
    "Segment",
    "indirect_pages",
    "pack_request",
    "pack_response_into",
    "pack_segments",
    "unpack_request",
    "unpack_response",
    "unpack_segments",
]

_DIRECT = (Op.READ, Op.WRITE, Op.WRITE_BARRIER, Op.FLUSH_DISKCACHE)


@dataclass(frozen=True, slots=True)
class Segment:
    """Sectors `first_sect` to `last_sect`, both included, of the page that `gref` grants.

    In 512-byte units, 0..7 each when legal; the wire holds 0..255.
    """

    gref: Gref
    first_sect: int = 0
    last_sect: int = SECTORS_PER_PAGE - 1

    @property
    def sectors(self) -> int:
        """512-byte sectors of data; not positive when the segment is illegal."""
        return self.last_sect - self.first_sect + 1


@dataclass(frozen=True, slots=True)
class Request:
    """READ, WRITE, WRITE_BARRIER or FLUSH_DISKCACHE with its data in the slot's own segments.

    `sector_number` counts 512-byte sectors. `claimed` is set only when the slot claims more
    segments than the 11 it has room for; `segments` then holds none of them.
    """

    operation: Op
    id: RequestId
    sector_number: int = 0
    segments: tuple[Segment, ...] = ()
    handle: int = 0
    claimed: int | None = None

    @property
    def nr_segments(self) -> int:
        """The number that the slot states, 0..255."""
        return len(self.segments) if self.claimed is None else self.claimed


@dataclass(frozen=True, slots=True)
class DiscardRequest:
    """DISCARD of `nr_sectors` 512-byte sectors; bit 0 of `flag` asks for secure erase."""

    id: RequestId
    sector_number: int
    nr_sectors: int
    flag: int = 0
    handle: int = 0


@dataclass(frozen=True, slots=True)
class IndirectRequest:
    """INDIRECT: `nr_segments` segments that lie in the pages which `indirect_grefs` grant.

    Only the references in use are kept, at most 8: the rest of the slot is undefined.
    """

    indirect_op: int
    id: RequestId
    sector_number: int
    nr_segments: int
    indirect_grefs: tuple[Gref, ...]
    handle: int = 0


@dataclass(frozen=True, slots=True)
class OtherRequest:
    """An operation that blkif does not have: nothing but these two fields may be interpreted."""

    operation: int
    id: RequestId


AnyRequest: TypeAlias = Request | DiscardRequest | IndirectRequest | OtherRequest


@dataclass(frozen=True, slots=True)
class Response:
    """The answer to the request of the same id; `status` is what the wire held, any s16.

    `operation` echoes the request's, except that an indirect request is answered with its inner
    operation: Linux's blkfront compares (blkif.h does not say).
    """

    id: RequestId
    operation: int
    status: int = Status.OKAY


def indirect_pages(nr_segments: int) -> int:
    """Pages that hold `nr_segments` indirect segments, 512 to a page."""
    return -(-nr_segments // SEGMENTS_PER_INDIRECT_PAGE)


def _width(struct: Struct, name: str) -> int:
    field: Field = next(field for field in struct.fields if field.name == name)
    assert isinstance(field.size, int)
    return field.size


def _get(abi: Abi, struct: Struct, data: bytes, name: str) -> int:
    at = abi.offset(struct, name)
    return int.from_bytes(data[at : at + _width(struct, name)], "little")


def _put(abi: Abi, struct: Struct, buffer: bytearray | memoryview, name: str, value: int) -> None:
    at, width = abi.offset(struct, name), _width(struct, name)
    if not 0 <= value < 1 << (8 * width):
        raise LocalProtocolError(f"{struct.name}.{name} has {width} bytes: {value} does not fit")
    buffer[at : at + width] = value.to_bytes(width, "little")


def pack_segments(segments: Sequence[Segment]) -> bytes:
    """The bytes of `segments` one after the other, 8 each: what an indirect page holds.

    A segment has no 64-bit field, so its layout is the same in every ABI.
    """
    packed = bytearray()
    for segment in segments:
        one = bytearray(Abi.X86_64.size(SEGMENT))
        for name in ("gref", "first_sect", "last_sect"):
            _put(Abi.X86_64, SEGMENT, one, name, getattr(segment, name))
        packed += one
    return bytes(packed)


def unpack_segments(data: bytes, count: int) -> tuple[Segment, ...]:
    """The first `count` segments of `data`, a private copy of one or more pages.

    LocalProtocolError when `data` is shorter than `count` segments.
    """
    size = Abi.X86_64.size(SEGMENT)
    if len(data) < count * size:
        raise LocalProtocolError(f"{count} segments do not fit in {len(data)} bytes")
    slices = (data[at : at + size] for at in range(0, count * size, size))
    return tuple(
        Segment(
            Gref(_get(Abi.X86_64, SEGMENT, one, "gref")),
            _get(Abi.X86_64, SEGMENT, one, "first_sect"),
            _get(Abi.X86_64, SEGMENT, one, "last_sect"),
        )
        for one in slices
    )


def pack_request(abi: Abi, request: AnyRequest) -> bytes:
    """The whole ring slot for `request`, `abi.entry_size` bytes; what is unused is zero.

    LocalProtocolError for a value that its field cannot hold, or for more segments or indirect
    references than the slot has room for. Illegal values that fit are packed as they are: hostile
    tests need them.
    """
    slot = bytearray(abi.entry_size)
    match request:
        case Request():
            _pack_direct(abi, slot, request)
        case DiscardRequest():
            _put(abi, DISCARD, slot, "operation", Op.DISCARD)
            for name in ("flag", "handle", "id", "sector_number", "nr_sectors"):
                _put(abi, DISCARD, slot, name, getattr(request, name))
        case IndirectRequest():
            _pack_indirect(abi, slot, request)
        case OtherRequest():
            for name in ("operation", "id"):
                _put(abi, OTHER, slot, name, getattr(request, name))
    return bytes(slot)


def _pack_direct(abi: Abi, slot: bytearray, request: Request) -> None:
    if len(request.segments) > MAX_SEGMENTS_PER_REQUEST:
        raise LocalProtocolError(
            f"a direct request has room for {MAX_SEGMENTS_PER_REQUEST} segments,"
            f" not {len(request.segments)}: send it as an indirect one, or as several"
        )
    for name in ("operation", "nr_segments", "handle", "id", "sector_number"):
        _put(abi, REQUEST, slot, name, getattr(request, name))
    packed = pack_segments(request.segments)
    at = abi.offset(REQUEST, "seg")
    slot[at : at + len(packed)] = packed


def _pack_indirect(abi: Abi, slot: bytearray, request: IndirectRequest) -> None:
    if len(request.indirect_grefs) > MAX_INDIRECT_PAGES_PER_REQUEST:
        raise LocalProtocolError(
            f"a request names at most {MAX_INDIRECT_PAGES_PER_REQUEST} indirect pages,"
            f" not {len(request.indirect_grefs)}"
        )
    _put(abi, INDIRECT, slot, "operation", Op.INDIRECT)
    for name in ("indirect_op", "nr_segments", "id", "sector_number", "handle"):
        _put(abi, INDIRECT, slot, name, getattr(request, name))
    at = abi.offset(INDIRECT, "indirect_grefs")
    for index, gref in enumerate(request.indirect_grefs):
        slot[at + 4 * index : at + 4 * index + 4] = gref.to_bytes(4, "little")


def unpack_request(abi: Abi, slot: bytes) -> AnyRequest:
    """Unpack `slot`, a private copy of at least `abi.entry_size` bytes.

    Never fails on what a peer wrote; LocalProtocolError only when `slot` is too short.
    """
    if len(slot) < abi.entry_size:
        raise LocalProtocolError(f"a slot has {abi.entry_size} bytes, not {len(slot)}")
    operation = _get(abi, OTHER, slot, "operation")
    request_id = RequestId(_get(abi, OTHER, slot, "id"))
    if operation in _DIRECT:
        claimed = _get(abi, REQUEST, slot, "nr_segments")
        too_many = claimed > MAX_SEGMENTS_PER_REQUEST
        return Request(
            Op(operation),
            request_id,
            _get(abi, REQUEST, slot, "sector_number"),
            unpack_segments(slot[abi.offset(REQUEST, "seg") :], 0 if too_many else claimed),
            _get(abi, REQUEST, slot, "handle"),
            claimed if too_many else None,
        )
    if operation == Op.DISCARD:
        return DiscardRequest(
            request_id,
            _get(abi, DISCARD, slot, "sector_number"),
            _get(abi, DISCARD, slot, "nr_sectors"),
            _get(abi, DISCARD, slot, "flag"),
            _get(abi, DISCARD, slot, "handle"),
        )
    if operation == Op.INDIRECT:
        nr_segments = _get(abi, INDIRECT, slot, "nr_segments")
        pages = min(indirect_pages(nr_segments), MAX_INDIRECT_PAGES_PER_REQUEST)
        first = abi.offset(INDIRECT, "indirect_grefs")
        grefs = (slot[at : at + 4] for at in range(first, first + 4 * pages, 4))
        return IndirectRequest(
            _get(abi, INDIRECT, slot, "indirect_op"),
            request_id,
            _get(abi, INDIRECT, slot, "sector_number"),
            nr_segments,
            tuple(Gref(int.from_bytes(gref, "little")) for gref in grefs),
            _get(abi, INDIRECT, slot, "handle"),
        )
    return OtherRequest(operation, request_id)


def pack_response_into(
    abi: Abi, buffer: bytearray | memoryview, offset: int, response: Response
) -> None:
    """Write the three fields of `response` at `offset`, and not one byte of the padding (XSA-216).

    A whole struct would carry this process's memory to the peer in its padding.
    """
    slot = memoryview(buffer)[offset:]
    _put(abi, RESPONSE, slot, "id", response.id)
    _put(abi, RESPONSE, slot, "operation", response.operation)
    _put(abi, RESPONSE, slot, "status", response.status & 0xFFFF)


def unpack_response(abi: Abi, slot: bytes) -> Response:
    """The response in `slot`, a private copy of at least ``abi.size(RESPONSE)`` bytes."""
    if len(slot) < abi.size(RESPONSE):
        raise LocalProtocolError(f"a response has {abi.size(RESPONSE)} bytes, not {len(slot)}")
    status = _get(abi, RESPONSE, slot, "status")
    return Response(
        RequestId(_get(abi, RESPONSE, slot, "id")),
        _get(abi, RESPONSE, slot, "operation"),
        status - 0x10000 if status & 0x8000 else status,
    )
