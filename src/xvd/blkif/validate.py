# SPDX-License-Identifier: Apache-2.0
"""What makes a request or a response illegal, and the status that answers it.

The one idea: a bad request is not an exception, it is a number. `validate` gives the first
`Refusal` in the documented order, `REFUSAL_STATUS` is the only place that turns a refusal into a
status, and the generated C header has both, so the compiled queue refuses with the same name.

Order of the checks, first hit wins (the compiled queue must keep it):

1. UNKNOWN_OPERATION
2. NOT_OFFERED
3. SECURE_NOT_OFFERED   (discard)
4. INDIRECT_OPERATION   (indirect)
5. NO_SEGMENTS          (read, write, indirect)
6. TOO_MANY_SEGMENTS    (all but discard)
7. READ_ONLY
8. per segment, in order of segments: SEGMENT_ORDER, then SEGMENT_PAST_PAGE
9. OUT_OF_RANGE         (not for a flush or barrier without segments)
10. MISALIGNED          (the same; not for a discard)
11. BAD_GRANT           (given by the data plane, not by `validate`)

Steps 1 to 7 read only the slot, so an indirect request is judged by them before its pages are
touched, and by all of them once its pages have been copied.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from errno import ENOSYS, ENOTSUP, EOPNOTSUPP
from typing import Final

from xvd.blkif.abi import (
    MAX_SEGMENTS_PER_REQUEST,
    SECTORS_PER_PAGE,
    DiscardFlag,
    Op,
    Status,
)
from xvd.blkif.messages import (
    AnyRequest,
    DiscardRequest,
    IndirectRequest,
    OtherRequest,
    Request,
    Response,
    Segment,
)
from xvd.errors import LocalProtocolError

__all__ = [
    "REFUSAL_STATUS",
    "Breach",
    "Limits",
    "Refusal",
    "accepted_operations",
    "answer",
    "check_response",
    "peer_status",
    "storage_status",
    "validate",
]


class Refusal(IntEnum):
    """Why a backend refuses a request; NONE means it may go to storage.

    The numbers are those of ``enum blkif_refusal``; the order of members is the order of checks.
    """

    NONE = 0
    UNKNOWN_OPERATION = 1
    """An operation that blkif.h does not have, or RESERVED_1 (SLES once sent SCSI with it).
    EOPNOTSUPP, as Linux and tapdisk say: a frontend then stops asking; ERROR would look like a
    broken disk. Only the id and the operation of such a slot are believed."""
    NOT_OFFERED = 2
    """Barrier, flush, discard or indirect without the backend's feature node. A frontend that
    migrated keeps the flags of its old backend for a while: EOPNOTSUPP makes it fall back."""
    SECURE_NOT_OFFERED = 3
    """A discard that asks for secure erase without ``discard-secure``. EOPNOTSUPP: doing an
    ordinary discard instead would leave data that the guest believes is gone."""
    INDIRECT_OPERATION = 4
    """An indirect request for something else than READ or WRITE. Nobody sends this by accident
    (Linux refuses it likewise); ERROR."""
    NO_SEGMENTS = 5
    """A read, write or indirect request without data. ERROR, as in Linux; empty flushes and
    empty barriers are legal and are not refused."""
    TOO_MANY_SEGMENTS = 6
    """More than 11 segments in the slot (tapdisk once believed up to 32), or more indirect ones
    than ``feature-max-indirect-segments``. ERROR, and never a loop bound."""
    READ_ONLY = 7
    """A write, a discard (CVE-2013-2140), or a flush or barrier that carries data, on a read-only
    disk. ERROR; the empty forms change nothing and are served."""
    SEGMENT_ORDER = 8
    """``first_sect`` lies after ``last_sect``: a negative length for whoever subtracts. ERROR."""
    SEGMENT_PAST_PAGE = 9
    """``last_sect`` is beyond the page's eighth sector: it would reach into the next mapping
    (tapdisk and NetBSD do not check). ERROR."""
    OUT_OF_RANGE = 10
    """The request ends behind the last sector, or its end wraps past 2^64 (QEMU and FreeBSD add
    without a check). Also what an honest frontend gets after the disk shrank. ERROR."""
    MISALIGNED = 11
    """The start or the length of a segment is no multiple of the logical block, on a disk whose
    ``sector-size`` exceeds 512; a frontend that ignores that node does this. ERROR."""
    BAD_GRANT = 12
    """A grant of the request, or of one of its indirect pages, could not be mapped or copied:
    never granted, revoked, or read-only where we write. ERROR for the whole request."""


REFUSAL_STATUS: Final[dict[Refusal, Status]] = {
    Refusal.NONE: Status.OKAY,
    Refusal.UNKNOWN_OPERATION: Status.EOPNOTSUPP,
    Refusal.NOT_OFFERED: Status.EOPNOTSUPP,
    Refusal.SECURE_NOT_OFFERED: Status.EOPNOTSUPP,
    Refusal.INDIRECT_OPERATION: Status.ERROR,
    Refusal.NO_SEGMENTS: Status.ERROR,
    Refusal.TOO_MANY_SEGMENTS: Status.ERROR,
    Refusal.READ_ONLY: Status.ERROR,
    Refusal.SEGMENT_ORDER: Status.ERROR,
    Refusal.SEGMENT_PAST_PAGE: Status.ERROR,
    Refusal.OUT_OF_RANGE: Status.ERROR,
    Refusal.MISALIGNED: Status.ERROR,
    Refusal.BAD_GRANT: Status.ERROR,
}
"""The status that answers each refusal: the only place where one is chosen."""


class Breach(IntEnum):
    """What a backend did that no backend may do; anything but NONE ends the frontend's device.

    The numbers are those of ``enum blkif_breach``, in the order of the checks. From Linux's
    hardened blkfront (5.16 on). An unknown status is no breach: NetBSD sends its errno values.
    """

    NONE = 0
    RESPONSE_OVERFLOW = 1
    """``rsp_prod`` is further ahead than there are requests. Said by the ring, not by
    `check_response`."""
    UNKNOWN_ID = 2
    """A response whose id is no slot of our shadow (FreeBSD would index with it)."""
    NOT_IN_FLIGHT = 3
    """A response to a request that is not outstanding: a duplicate, or one never sent."""
    WRONG_OPERATION = 4
    """A response that names another operation than its request (or, of an indirect request,
    neither 6 nor the inner operation)."""
    GRANT_STILL_MAPPED = 5
    """A grant that is not persistent is still mapped after its response (XSA-396): the page can
    be neither reused nor freed. Said by the data plane, not by `check_response`."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one disk allows, and what was offered to its frontend; fixed while it is connected.

    `capacity` counts 512-byte sectors; it alone may change (resize). `block_sectors` is the
    logical block in 512-byte sectors, a power of two. `wire_sector` is how many of them the
    frontend counts as one: 1, or `block_sectors` for drivers of before Xen 221f2748e8.
    `indirect_max` is the published ``feature-max-indirect-segments``, 0 when indirect requests were
    not offered.
    """

    capacity: int
    block_sectors: int = 1
    wire_sector: int = 1
    read_only: bool = False
    flush: bool = True
    barrier: bool = False
    discard: bool = False
    secure_discard: bool = False
    indirect_max: int = 0


def validate(
    request: AnyRequest, limits: Limits, segments: Sequence[Segment] | None = None
) -> Refusal:
    """The first reason to refuse `request`, or NONE.

    An indirect request is judged twice: without `segments` by checks 1 to 7, and, once its pages
    have been copied, by all of them with the `nr_segments` segments that they held. For every
    other request `segments` stays None. LocalProtocolError when the number of segments given is
    not the number that the request states.
    """
    match request:
        case OtherRequest():
            return Refusal.UNKNOWN_OPERATION
        case DiscardRequest():
            return _discard(request, limits)
        case Request():
            return _direct(request, limits)
        case IndirectRequest():
            return _indirect(request, limits, segments)


def _direct(request: Request, limits: Limits) -> Refusal:
    empty = request.nr_segments == 0
    if request.operation is Op.WRITE_BARRIER and not limits.barrier:
        return Refusal.NOT_OFFERED
    if request.operation is Op.FLUSH_DISKCACHE and not limits.flush:
        return Refusal.NOT_OFFERED
    if empty and request.operation in (Op.READ, Op.WRITE):
        return Refusal.NO_SEGMENTS
    if request.nr_segments > MAX_SEGMENTS_PER_REQUEST:
        return Refusal.TOO_MANY_SEGMENTS
    if limits.read_only and not empty and request.operation is not Op.READ:
        return Refusal.READ_ONLY
    if empty:
        # A pure flush or barrier touches no sector: its sector_number means nothing.
        return Refusal.NONE
    return _data(request.sector_number, request.segments, limits)


def _discard(request: DiscardRequest, limits: Limits) -> Refusal:
    if not limits.discard:
        return Refusal.NOT_OFFERED
    if request.flag & DiscardFlag.SECURE and not limits.secure_discard:
        return Refusal.SECURE_NOT_OFFERED
    if limits.read_only:
        return Refusal.READ_ONLY
    # Advisory, so head and tail may lie across a block; nothing at all is answered OKAY.
    wire_sector = limits.wire_sector
    return _range(request.sector_number * wire_sector, request.nr_sectors * wire_sector, limits)


def _indirect(
    request: IndirectRequest, limits: Limits, segments: Sequence[Segment] | None
) -> Refusal:
    if not limits.indirect_max:
        return Refusal.NOT_OFFERED
    if request.indirect_op not in (Op.READ, Op.WRITE):
        return Refusal.INDIRECT_OPERATION
    if request.nr_segments == 0:
        return Refusal.NO_SEGMENTS
    if request.nr_segments > limits.indirect_max:
        return Refusal.TOO_MANY_SEGMENTS
    if limits.read_only and request.indirect_op == Op.WRITE:
        return Refusal.READ_ONLY
    if segments is None:
        return Refusal.NONE
    if len(segments) != request.nr_segments:
        raise LocalProtocolError(f"{len(segments)} segments for {request.nr_segments} stated")
    return _data(request.sector_number, segments, limits)


def _data(sector_number: int, segments: Sequence[Segment], limits: Limits) -> Refusal:
    total, wire_sector = 0, limits.wire_sector
    sector_number *= wire_sector
    misaligned = sector_number % limits.block_sectors != 0
    for segment in segments:
        if segment.first_sect > segment.last_sect:
            return Refusal.SEGMENT_ORDER
        if segment.last_sect >= SECTORS_PER_PAGE // wire_sector:
            return Refusal.SEGMENT_PAST_PAGE
        total += segment.sectors * wire_sector
        misaligned = misaligned or segment.sectors * wire_sector % limits.block_sectors != 0
    refusal = _range(sector_number, total, limits)
    if refusal is Refusal.NONE and misaligned:
        return Refusal.MISALIGNED
    return refusal


def _range(sector_number: int, sectors: int, limits: Limits) -> Refusal:
    # Subtracted, not added: a sum of two u64 wraps in every language but this one.
    if sectors > limits.capacity or sector_number > limits.capacity - sectors:
        return Refusal.OUT_OF_RANGE
    return Refusal.NONE


def storage_status(errno: int) -> Status:
    """The status for what the storage engine said: 0, or a positive errno.

    Only "not supported" is told from other errors: the frontend then stops using the operation.
    """
    if errno == 0:
        return Status.OKAY
    return Status.EOPNOTSUPP if errno in (EOPNOTSUPP, ENOTSUP, ENOSYS) else Status.ERROR


def answer(request: AnyRequest, status: Status) -> Response:
    """The response to `request`: its id, its operation (the inner one of an indirect), `status`."""
    match request:
        case DiscardRequest():
            return Response(request.id, Op.DISCARD, status)
        case IndirectRequest():
            return Response(request.id, request.indirect_op, status)
        case _:
            return Response(request.id, request.operation, status)


def accepted_operations(request: AnyRequest) -> tuple[int, ...]:
    """The operations that a response to `request` may name: what a frontend's shadow remembers.

    Backends answer an indirect request with the inner operation; blkif.h does not say, so 6 is
    accepted too.
    """
    inner = answer(request, Status.OKAY).operation
    return (inner, Op.INDIRECT) if isinstance(request, IndirectRequest) else (inner,)


def check_response(response: Response, shadow: Sequence[tuple[int, ...] | None]) -> Breach:
    """Return what is wrong with `response`: UNKNOWN_ID, NOT_IN_FLIGHT, WRONG_OPERATION, or NONE.

    `shadow` is private and indexed by request id: the `accepted_operations` of a request in
    flight, None where none is.
    """
    if response.id >= len(shadow):
        return Breach.UNKNOWN_ID
    accepted = shadow[response.id]
    if accepted is None:
        return Breach.NOT_IN_FLIGHT
    return Breach.NONE if response.operation in accepted else Breach.WRONG_OPERATION


def peer_status(status: int) -> Status:
    """The status a frontend acts on: what is neither OKAY nor EOPNOTSUPP is an error."""
    return Status(status) if status in (Status.OKAY, Status.EOPNOTSUPP) else Status.ERROR
