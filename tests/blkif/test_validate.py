# SPDX-License-Identifier: Apache-2.0
"""One example for each refusal and each breach, and the order in which they are found."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xvd.blkif.abi import Abi, Op, Status
from xvd.blkif.messages import (
    AnyRequest,
    DiscardRequest,
    IndirectRequest,
    OtherRequest,
    Request,
    Response,
    Segment,
    unpack_request,
)
from xvd.blkif.validate import (
    REFUSAL_STATUS,
    Breach,
    Limits,
    Refusal,
    accepted_operations,
    answer,
    check_response,
    peer_status,
    storage_status,
    validate,
)
from xvd.errors import LocalProtocolError
from xvd.types import Gref, RequestId

ALL = Limits(1000, flush=True, barrier=True, discard=True, secure_discard=True, indirect_max=256)
NOTHING = Limits(1000, flush=False)
READ_ONLY = Limits(1000, read_only=True, barrier=True, discard=True, indirect_max=256)
BLOCKS_4K = Limits(1000, block_sectors=8, indirect_max=256)


def seg(first: int = 0, last: int = 7) -> Segment:
    return Segment(Gref(8), first, last)


def direct(op: Op, *segments: Segment, at: int = 0) -> Request:
    return Request(op, RequestId(1), at, segments)


def too_many(op: Op) -> Request:
    return Request(op, RequestId(1), claimed=12)


def discard(at: int = 0, sectors: int = 8, flag: int = 0) -> DiscardRequest:
    return DiscardRequest(RequestId(1), at, sectors, flag)


def indirect(op: int = Op.READ, count: int = 2, at: int = 0) -> IndirectRequest:
    return IndirectRequest(op, RequestId(1), at, count, (Gref(9),))


@pytest.mark.parametrize(
    ("request_", "limits", "refusal"),
    [
        (OtherRequest(4, RequestId(1)), ALL, Refusal.UNKNOWN_OPERATION),
        (OtherRequest(7, RequestId(1)), ALL, Refusal.UNKNOWN_OPERATION),
        (direct(Op.WRITE_BARRIER, seg()), NOTHING, Refusal.NOT_OFFERED),
        (direct(Op.FLUSH_DISKCACHE), NOTHING, Refusal.NOT_OFFERED),
        (discard(), NOTHING, Refusal.NOT_OFFERED),
        (indirect(), NOTHING, Refusal.NOT_OFFERED),
        (discard(flag=1), Limits(1000, discard=True), Refusal.SECURE_NOT_OFFERED),
        (indirect(Op.FLUSH_DISKCACHE), ALL, Refusal.INDIRECT_OPERATION),
        (indirect(Op.INDIRECT), ALL, Refusal.INDIRECT_OPERATION),
        (direct(Op.READ), ALL, Refusal.NO_SEGMENTS),
        (direct(Op.WRITE), ALL, Refusal.NO_SEGMENTS),
        (indirect(count=0), ALL, Refusal.NO_SEGMENTS),
        (too_many(Op.READ), ALL, Refusal.TOO_MANY_SEGMENTS),
        (too_many(Op.FLUSH_DISKCACHE), ALL, Refusal.TOO_MANY_SEGMENTS),
        (indirect(count=257), ALL, Refusal.TOO_MANY_SEGMENTS),
        (direct(Op.WRITE, seg()), READ_ONLY, Refusal.READ_ONLY),
        (direct(Op.WRITE_BARRIER, seg()), READ_ONLY, Refusal.READ_ONLY),
        (direct(Op.FLUSH_DISKCACHE, seg()), READ_ONLY, Refusal.READ_ONLY),
        (discard(), READ_ONLY, Refusal.READ_ONLY),
        (indirect(Op.WRITE), READ_ONLY, Refusal.READ_ONLY),
        (direct(Op.READ, seg(), seg(3, 2)), ALL, Refusal.SEGMENT_ORDER),
        (direct(Op.READ, seg(), seg(0, 8)), ALL, Refusal.SEGMENT_PAST_PAGE),
        (direct(Op.READ, seg(), at=993), ALL, Refusal.OUT_OF_RANGE),
        (direct(Op.WRITE, seg(), at=2**64 - 4), ALL, Refusal.OUT_OF_RANGE),
        (direct(Op.FLUSH_DISKCACHE, seg(), at=1000), ALL, Refusal.OUT_OF_RANGE),
        (discard(at=999, sectors=2), ALL, Refusal.OUT_OF_RANGE),
        (discard(at=8, sectors=2**64 - 4), ALL, Refusal.OUT_OF_RANGE),
        (direct(Op.READ, seg(), at=4), BLOCKS_4K, Refusal.MISALIGNED),
        (direct(Op.READ, seg(), seg(0, 3)), BLOCKS_4K, Refusal.MISALIGNED),
    ],
)
def test_refused(request_: AnyRequest, limits: Limits, refusal: Refusal) -> None:
    assert validate(request_, limits) is refusal


@pytest.mark.parametrize(
    ("request_", "limits"),
    [
        (direct(Op.READ, seg(), at=992), ALL),
        (direct(Op.READ, *[seg()] * 11), ALL),
        (direct(Op.READ, seg(7, 7), at=999), ALL),
        (direct(Op.READ, seg()), READ_ONLY),
        (direct(Op.FLUSH_DISKCACHE), READ_ONLY),
        (direct(Op.WRITE_BARRIER), READ_ONLY),
        (direct(Op.FLUSH_DISKCACHE, at=2**64 - 1), ALL),
        (direct(Op.FLUSH_DISKCACHE, seg()), ALL),
        (direct(Op.FLUSH_DISKCACHE, at=3), BLOCKS_4K),
        (discard(at=1000, sectors=0), ALL),
        (discard(at=3, sectors=5), Limits(1000, block_sectors=8, discard=True)),
        (discard(flag=0xFE), Limits(1000, discard=True)),
        (discard(flag=1), ALL),
        (indirect(Op.READ), READ_ONLY),
        (indirect(count=256), ALL),
        (direct(Op.READ, seg(), at=8), BLOCKS_4K),
    ],
)
def test_served(request_: AnyRequest, limits: Limits) -> None:
    assert validate(request_, limits) is Refusal.NONE


@pytest.mark.parametrize(
    ("request_", "segments", "limits", "refusal"),
    [
        (indirect(), [seg(), seg(0, 3)], ALL, Refusal.NONE),
        (indirect(), [seg(), seg(4, 3)], ALL, Refusal.SEGMENT_ORDER),
        (indirect(), [seg(), seg(0, 255)], ALL, Refusal.SEGMENT_PAST_PAGE),
        (indirect(at=985), [seg(), seg()], ALL, Refusal.OUT_OF_RANGE),
        (indirect(at=984), [seg(), seg()], ALL, Refusal.NONE),
        (indirect(), [seg(), seg(0, 3)], BLOCKS_4K, Refusal.MISALIGNED),
        (indirect(Op.WRITE), [seg(), seg(4, 3)], READ_ONLY, Refusal.READ_ONLY),
    ],
)
def test_indirect_once_its_pages_are_copied(
    request_: IndirectRequest, segments: list[Segment], limits: Limits, refusal: Refusal
) -> None:
    assert validate(request_, limits, segments) is refusal


def test_segments_that_are_not_those_stated_are_our_mistake() -> None:
    with pytest.raises(LocalProtocolError, match="1 segments for 2 stated"):
        validate(indirect(), ALL, [seg()])


@pytest.mark.parametrize(
    ("request_", "limits", "first"),
    [
        (direct(Op.WRITE), READ_ONLY, Refusal.NO_SEGMENTS),
        (too_many(Op.WRITE), READ_ONLY, Refusal.TOO_MANY_SEGMENTS),
        (direct(Op.WRITE, seg(9, 8)), READ_ONLY, Refusal.READ_ONLY),
        (direct(Op.READ, seg(10, 9)), ALL, Refusal.SEGMENT_ORDER),
        (direct(Op.READ, seg(0, 8), seg(3, 2)), ALL, Refusal.SEGMENT_PAST_PAGE),
        (direct(Op.READ, seg(0, 8), at=5000), ALL, Refusal.SEGMENT_PAST_PAGE),
        (direct(Op.READ, seg(), at=1001), BLOCKS_4K, Refusal.OUT_OF_RANGE),
        (discard(flag=1), NOTHING, Refusal.NOT_OFFERED),
        (discard(flag=1), READ_ONLY, Refusal.SECURE_NOT_OFFERED),
        (discard(at=5000), READ_ONLY, Refusal.READ_ONLY),
        (indirect(Op.DISCARD, 0), ALL, Refusal.INDIRECT_OPERATION),
    ],
)
def test_the_first_of_two_reasons_is_given(
    request_: AnyRequest, limits: Limits, first: Refusal
) -> None:
    assert validate(request_, limits) is first


@given(
    abi=st.sampled_from(Abi),
    slot=st.binary(min_size=112, max_size=112),
    operation=st.integers(0, 7),
    limits=st.sampled_from([ALL, NOTHING, READ_ONLY, BLOCKS_4K]),
)
def test_any_slot_gets_one_refusal_and_one_status(
    abi: Abi, slot: bytes, operation: int, limits: Limits
) -> None:
    request = unpack_request(abi, bytes([operation]) + slot[1:])

    refusal = validate(request, limits)

    assert REFUSAL_STATUS[refusal] in Status
    assert answer(request, REFUSAL_STATUS[refusal]).id == request.id


def test_every_refusal_has_a_status() -> None:
    assert set(REFUSAL_STATUS) == set(Refusal)


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (0, Status.OKAY),
        (errno.EIO, Status.ERROR),
        (errno.ENOSPC, Status.ERROR),
        (errno.EOPNOTSUPP, Status.EOPNOTSUPP),
        (errno.ENOSYS, Status.EOPNOTSUPP),
    ],
)
def test_what_storage_says_becomes_a_status(number: int, status: Status) -> None:
    assert storage_status(number) is status


@pytest.mark.parametrize(
    ("request_", "operation"),
    [
        (direct(Op.FLUSH_DISKCACHE), 3),
        (discard(), 5),
        (indirect(Op.WRITE), 1),
        (OtherRequest(200, RequestId(1)), 200),
    ],
)
def test_a_response_names_the_operation_that_linux_compares(
    request_: AnyRequest, operation: int
) -> None:
    assert answer(request_, Status.OKAY) == Response(RequestId(1), operation)


SHADOW = [None, accepted_operations(direct(Op.READ, seg())), accepted_operations(indirect())]


@pytest.mark.parametrize(
    ("response", "breach"),
    [
        (Response(RequestId(1), Op.READ), Breach.NONE),
        (Response(RequestId(1), Op.READ, 22), Breach.NONE),
        (Response(RequestId(2), Op.READ), Breach.NONE),
        (Response(RequestId(2), Op.INDIRECT), Breach.NONE),
        (Response(RequestId(3), Op.READ), Breach.UNKNOWN_ID),
        (Response(RequestId(2**64 - 1), Op.READ), Breach.UNKNOWN_ID),
        (Response(RequestId(0), Op.READ), Breach.NOT_IN_FLIGHT),
        (Response(RequestId(1), Op.WRITE), Breach.WRONG_OPERATION),
        (Response(RequestId(1), Op.INDIRECT), Breach.WRONG_OPERATION),
        (Response(RequestId(2), Op.WRITE), Breach.WRONG_OPERATION),
    ],
)
def test_breach(response: Response, breach: Breach) -> None:
    assert check_response(response, SHADOW) is breach


@pytest.mark.parametrize(
    ("wire", "status"),
    [
        (0, Status.OKAY),
        (-1, Status.ERROR),
        (-2, Status.EOPNOTSUPP),
        (22, Status.ERROR),
        (-3, Status.ERROR),
    ],
)
def test_an_unknown_status_is_an_error(wire: int, status: Status) -> None:
    """NetBSD's backend answers with a positive errno."""
    assert peer_status(wire) is status
