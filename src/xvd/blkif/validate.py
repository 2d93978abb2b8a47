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

from enum import IntEnum
from typing import Final

from xvd.blkif.abi import Status

__all__ = ["REFUSAL_STATUS", "Breach", "Refusal"]


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
    (tapdisk and NetBSD do not look). ERROR."""
    OUT_OF_RANGE = 10
    """The request ends behind the last sector, or its end wraps past 2^64 (QEMU and FreeBSD add
    without looking). Also what an honest frontend gets after the disk shrank. ERROR."""
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

    The numbers are those of ``enum blkif_breach``. From Linux's hardened blkfront (5.16 on).
    """

    NONE = 0
    RESPONSE_OVERFLOW = 1
    """``rsp_prod`` is further ahead than requests are outstanding."""
    UNKNOWN_ID = 2
    """A response whose id is no slot of our shadow (FreeBSD would index with it)."""
    NOT_IN_FLIGHT = 3
    """A response to a request that is not outstanding: a duplicate, or one never sent."""
    WRONG_OPERATION = 4
    """A response that names another operation than its request (or, of an indirect request,
    neither 6 nor the inner operation)."""
    GRANT_STILL_MAPPED = 5
    """A grant that is not persistent is still mapped after its response (XSA-396): the page can
    be neither reused nor freed."""
