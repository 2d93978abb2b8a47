# SPDX-License-Identifier: Apache-2.0
"""Requests and responses against golden bytes, and round trips of whatever can be said."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xvd.blkif.abi import (
    MAX_INDIRECT_SEGMENTS,
    MAX_SEGMENTS_PER_REQUEST,
    RESPONSE,
    Abi,
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
    indirect_pages,
    pack_request,
    pack_response_into,
    pack_segments,
    unpack_request,
    unpack_response,
    unpack_segments,
)
from xvd.errors import LocalProtocolError
from xvd.types import Gref, RequestId

WRITE = Request(
    Op.WRITE,
    RequestId(0x1122334455667788),
    8,
    (Segment(Gref(16), 0, 7), Segment(Gref(17), 0, 3)),
    0xCA00,
)
DISCARD = DiscardRequest(RequestId(1), 16, 2048, DiscardFlag.SECURE, 0xCA00)
INDIRECT = IndirectRequest(Op.READ, RequestId(2), 0, 33, (Gref(9),), 0xCA00)
OTHER = OtherRequest(200, RequestId(3))

WRITE_TAIL = "8877665544332211 0800000000000000 10000000 00 07 0000 11000000 00 03 0000"
GOLDEN = [
    (Abi.X86_64, WRITE, "01 02 00ca 00000000" + WRITE_TAIL),
    (Abi.ARM, WRITE, "01 02 00ca 00000000" + WRITE_TAIL),
    (Abi.X86_32, WRITE, "01 02 00ca" + WRITE_TAIL),
    (Abi.X86_64, DISCARD, "05 01 00ca 00000000 0100000000000000 1000000000000000 0008000000000000"),
    (Abi.ARM, DISCARD, "05 01 00ca 00000000 0100000000000000 1000000000000000 0008000000000000"),
    (Abi.X86_32, DISCARD, "05 01 00ca 0100000000000000 1000000000000000 0008000000000000"),
    (
        Abi.X86_64,
        INDIRECT,
        "06 00 2100 00000000 0200000000000000 0000000000000000 00ca 0000 09000000",
    ),
    (Abi.ARM, INDIRECT, "06 00 2100 00000000 0200000000000000 0000000000000000 00ca 0000 09000000"),
    (Abi.X86_32, INDIRECT, "06 00 2100 0200000000000000 0000000000000000 00ca 0000 09000000"),
    (Abi.X86_64, OTHER, "c8 00 0000 00000000 0300000000000000"),
    (Abi.X86_32, OTHER, "c8 00 0000 0300000000000000"),
]


@pytest.mark.parametrize(("abi", "request_", "golden"), GOLDEN)
def test_golden_request(abi: Abi, request_: AnyRequest, golden: str) -> None:
    slot = pack_request(abi, request_)

    assert slot == bytes.fromhex(golden).ljust(abi.entry_size, b"\0")
    assert unpack_request(abi, slot) == request_


@pytest.mark.parametrize(
    ("response", "golden"),
    [
        (Response(RequestId(2), Op.READ), "0200000000000000 00 ee 0000"),
        (
            Response(RequestId(3), Op.FLUSH_DISKCACHE, Status.EOPNOTSUPP),
            "0300000000000000 03 ee feff",
        ),
    ],
)
@pytest.mark.parametrize("abi", list(Abi))
def test_a_response_leaves_every_byte_of_padding_alone(
    abi: Abi, response: Response, golden: str
) -> None:
    """XSA-216: a whole struct written here once showed the backend's stack to guests."""
    slot = bytearray(b"\xee" * abi.entry_size)

    pack_response_into(abi, slot, 0, response)

    assert slot == bytes.fromhex(golden).ljust(abi.entry_size, b"\xee")
    assert unpack_response(abi, bytes(slot)) == response


def test_a_response_is_written_at_its_offset() -> None:
    buffer = bytearray(64)

    pack_response_into(Abi.X86_64, buffer, 24, Response(RequestId(1), Op.WRITE))

    assert buffer.index(1) == 24


def segments(maximum: int) -> st.SearchStrategy[tuple[Segment, ...]]:
    byte = st.integers(0, 255)
    one = st.builds(Segment, st.integers(0, 2**32 - 1), byte, byte)
    return st.lists(one, max_size=maximum).map(tuple)


U64 = st.integers(0, 2**64 - 1)
U16 = st.integers(0, 2**16 - 1)
DIRECT = st.sampled_from([Op.READ, Op.WRITE, Op.WRITE_BARRIER, Op.FLUSH_DISKCACHE])
REQUESTS = st.one_of(
    st.builds(Request, DIRECT, U64, U64, segments(MAX_SEGMENTS_PER_REQUEST), U16),
    st.builds(Request, DIRECT, U64, U64, st.just(()), U16, st.integers(12, 255)),
    st.builds(DiscardRequest, U64, U64, U64, st.integers(0, 255), U16),
    st.integers(0, MAX_INDIRECT_SEGMENTS).flatmap(
        lambda count: st.builds(
            IndirectRequest,
            st.integers(0, 255),
            U64,
            U64,
            st.just(count),
            st.tuples(*[st.integers(0, 2**32 - 1)] * indirect_pages(count)),
            U16,
        )
    ),
    st.builds(OtherRequest, st.sampled_from([4, *range(7, 256)]), U64),
)


@given(abi=st.sampled_from(Abi), request=REQUESTS)
def test_every_request_survives_the_wire(abi: Abi, request: AnyRequest) -> None:
    assert unpack_request(abi, pack_request(abi, request)) == request


@given(abi=st.sampled_from(Abi), slot=st.binary(min_size=112, max_size=112))
def test_no_slot_can_fail_to_unpack(abi: Abi, slot: bytes) -> None:
    request = unpack_request(abi, slot)

    assert request.id == int.from_bytes(slot[abi.alignment : abi.alignment + 8], "little")


@given(abi=st.sampled_from(Abi), request=REQUESTS, junk=st.binary(min_size=1, max_size=40))
def test_what_follows_a_slot_means_nothing(abi: Abi, request: AnyRequest, junk: bytes) -> None:
    assert unpack_request(abi, pack_request(abi, request) + junk) == request


@given(
    abi=st.sampled_from(Abi),
    response=st.builds(Response, U64, st.integers(0, 255), st.integers(-(2**15), 2**15 - 1)),
)
def test_every_response_survives_the_wire(abi: Abi, response: Response) -> None:
    slot = bytearray(abi.size(RESPONSE))

    pack_response_into(abi, slot, 0, response)

    assert unpack_response(abi, bytes(slot)) == response


@given(given_segments=segments(40))
def test_indirect_segments_survive_the_wire(given_segments: tuple[Segment, ...]) -> None:
    page = pack_segments(given_segments).ljust(4096, b"\xee")

    assert unpack_segments(page, len(given_segments)) == given_segments


def test_indirect_pages_hold_512_segments() -> None:
    assert [indirect_pages(n) for n in (0, 1, 512, 513, 4096)] == [0, 1, 1, 2, 8]


def test_an_indirect_count_beyond_eight_pages_names_no_ninth() -> None:
    slot = bytearray(pack_request(Abi.X86_64, INDIRECT))
    slot[2:4] = b"\xff\xff"

    request = unpack_request(Abi.X86_64, bytes(slot))

    assert isinstance(request, IndirectRequest)
    assert (request.nr_segments, len(request.indirect_grefs)) == (65535, 8)


def test_twelve_segments_do_not_fit_in_a_slot() -> None:
    request = Request(Op.READ, RequestId(0), 0, (Segment(Gref(8)),) * 12)

    with pytest.raises(LocalProtocolError, match="room for 11 segments, not 12"):
        pack_request(Abi.X86_64, request)


def test_nine_indirect_pages_do_not_fit_in_a_slot() -> None:
    request = IndirectRequest(Op.READ, RequestId(0), 0, 4097, (Gref(8),) * 9)

    with pytest.raises(LocalProtocolError, match="at most 8 indirect pages, not 9"):
        pack_request(Abi.X86_64, request)


def test_a_number_too_large_for_its_field_is_our_mistake() -> None:
    request = Request(Op.READ, RequestId(2**64))

    with pytest.raises(LocalProtocolError, match=r"request\.id has 8 bytes"):
        pack_request(Abi.X86_64, request)


@pytest.mark.parametrize("abi", list(Abi))
def test_a_short_slot_is_our_mistake(abi: Abi) -> None:
    with pytest.raises(LocalProtocolError, match="a slot has"):
        unpack_request(abi, bytes(abi.entry_size - 1))


def test_a_segment_counts_its_sectors() -> None:
    assert [Segment(Gref(8), *span).sectors for span in ((0, 7), (3, 3), (5, 2))] == [8, 1, -2]
