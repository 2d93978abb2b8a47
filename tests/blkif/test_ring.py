# SPDX-License-Identifier: Apache-2.0
"""Both ends of the ring over one page: order, wrap, notification, and peers that lie."""

from collections import deque
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xvd.blkif.abi import SRING_REQ_EVENT, SRING_REQ_PROD, SRING_RSP_EVENT, SRING_RSP_PROD, Abi, Op
from xvd.blkif.messages import Request, Response, pack_request, unpack_request
from xvd.blkif.ring import BackRing, FrontRing, Outcome, must_notify
from xvd.errors import LocalProtocolError, PeerProtocolError
from xvd.types import PAGE_SIZE, RequestId

LAST = 2**32 - 1


class RingPair:
    """A frontend and a backend over one ring, whose indices begin at `start`."""

    def __init__(self, abi: Abi = Abi.X86_64, pages: int = 1, start: int = 0) -> None:
        self.page = memoryview(bytearray(pages * PAGE_SIZE))
        self.front = FrontRing(self.page, abi, pages).init(start)
        self.back = BackRing(self.page, abi, pages).attach()

    def word(self, offset: int) -> int:
        return int.from_bytes(self.page[offset : offset + 4], "little")

    def lie(self, offset: int, value: int) -> None:
        self.page[offset : offset + 4] = value.to_bytes(4, "little")

    def send(self, *ids: int) -> bool:
        for number in ids:
            self.front.put_request(read(number))
        return self.front.push()

    def answer(self, *ids: int) -> bool:
        for number in ids:
            self.back.put_response(Response(RequestId(number), Op.READ))
        return self.back.push()

    def taken(self) -> list[int]:
        ids: list[int] = []
        while True:
            outcome, slot = self.back.take()
            if outcome is not Outcome.REQUEST:
                return ids
            ids.append(int(unpack_request(self.back.abi, slot).id))

    def answered(self) -> list[int]:
        ids = []
        while (response := self.front.take_response()[1]) is not None:
            ids.append(int(response.id))
        return ids


def read(number: int) -> Request:
    return Request(Op.READ, RequestId(number))


@pytest.mark.parametrize(
    ("old", "new", "event", "notify"),
    [
        (0, 1, 1, True),
        (0, 3, 5, False),
        (4, 6, 5, True),
        (LAST, 1, 0, True),
        (5, 6, 5, False),
        (0, 32, 1, True),
    ],
)
def test_notification_examples(old: int, new: int, event: int, notify: bool) -> None:
    assert must_notify(old, new, event) is notify


def test_a_fresh_ring_asks_for_the_first_entry_of_either_kind() -> None:
    pair = RingPair()

    words = [
        pair.word(at) for at in (SRING_REQ_PROD, SRING_REQ_EVENT, SRING_RSP_PROD, SRING_RSP_EVENT)
    ]

    assert words == [0, 1, 0, 1]


@pytest.mark.parametrize("abi", list(Abi))
@pytest.mark.parametrize("pages", [1, 2, 16])
@pytest.mark.parametrize("start", [0, 5, LAST, LAST - 31])
def test_a_full_ring_goes_round(abi: Abi, pages: int, start: int) -> None:
    pair = RingPair(abi, pages, start)
    ids = list(range(pair.front.nr_ents))

    pair.send(*ids)
    taken = pair.taken()
    pair.answer(*reversed(taken))
    answered = pair.answered()

    assert taken == ids
    assert answered == ids[::-1]
    assert pair.front.free_slots() == pair.front.nr_ents


def test_slots_straddle_pages() -> None:
    pair = RingPair(Abi.X86_32, 2)
    slots = [pack_request(Abi.X86_32, read(0x1111111111111111 * i % 2**64)) for i in range(64)]

    for slot in slots:
        pair.front.put_request(slot)
    pair.front.push()

    assert [pair.back.take()[1] for _ in slots] == slots


def test_a_full_ring_takes_no_further_request() -> None:
    pair = RingPair()
    pair.send(*range(32))

    with pytest.raises(LocalProtocolError, match="all 32 slots"):
        pair.front.put_request(read(32))


def test_requests_are_invisible_until_pushed() -> None:
    pair = RingPair()

    pair.front.put_request(read(1))

    assert pair.back.take() == (Outcome.EMPTY, b"")


def test_responses_are_invisible_until_pushed() -> None:
    pair = RingPair()
    pair.send(1)
    pair.taken()

    pair.back.put_response(Response(RequestId(1), Op.READ))

    assert pair.front.take_response() == (Outcome.EMPTY, None)


def test_the_first_request_notifies_and_the_next_does_not_until_asked_for() -> None:
    pair = RingPair()

    notified = [pair.send(1), pair.send(2), pair.send(3)]

    assert notified == [True, False, False]


def test_final_check_asks_for_the_next_request() -> None:
    pair = RingPair()
    pair.send(1)
    pair.taken()

    more = pair.back.final_check()

    assert not more
    assert pair.send(2)


def test_final_check_sees_a_request_that_came_meanwhile() -> None:
    pair = RingPair()
    pair.send(1, 2)
    pair.back.take()

    assert pair.back.final_check()
    assert pair.word(SRING_REQ_EVENT) == 1


def test_hold_off_wakes_the_frontend_once_for_several_responses() -> None:
    pair = RingPair()
    pair.send(*range(8))
    pair.taken()

    more = pair.front.final_check(hold_off=4)

    assert not more
    assert [pair.answer(number) for number in range(5)] == [False, False, False, True, False]


def test_hold_off_never_waits_for_more_than_is_outstanding() -> None:
    pair = RingPair()
    pair.send(0, 1)
    pair.taken()

    pair.front.final_check(hold_off=32)

    assert pair.answer(0, 1)


def test_more_responses_than_requests_is_our_mistake() -> None:
    pair = RingPair()
    pair.send(1)
    pair.taken()
    pair.answer(1)

    with pytest.raises(LocalProtocolError, match="answers no request"):
        pair.back.put_response(Response(RequestId(1), Op.READ))


@pytest.mark.parametrize("start", [0, LAST - 3])
def test_a_request_producer_beyond_the_ring_breaks_it(start: int) -> None:
    """The index of a hostile frontend would otherwise be a loop bound of its choice."""
    pair = RingPair(start=start)

    pair.lie(SRING_REQ_PROD, (start + 33) % 2**32)

    assert pair.back.take() == (Outcome.BROKEN, b"")


def test_a_response_producer_beyond_the_ring_breaks_it() -> None:
    pair = RingPair()

    pair.lie(SRING_RSP_PROD, 33)

    assert pair.front.take_response() == (Outcome.BROKEN, None)


def test_a_request_producer_that_goes_back_yields_no_more_than_a_ring() -> None:
    pair = RingPair()
    pair.send(*range(10))
    pair.taken()

    pair.lie(SRING_REQ_PROD, 5)

    assert len(pair.taken()) == 22


def test_unanswered_requests_bound_what_is_taken() -> None:
    pair = RingPair()
    pair.send(*range(32))
    pair.taken()

    assert pair.back.take() == (Outcome.EMPTY, b"")
    assert not pair.back.final_check()


def test_attach_takes_again_what_was_not_answered() -> None:
    pair = RingPair(start=LAST - 1)
    pair.send(*range(6))
    pair.taken()
    pair.answer(0, 1)

    successor = BackRing(pair.page, Abi.X86_64).attach()

    assert successor.unconsumed() == 4
    assert unpack_request(Abi.X86_64, successor.take()[1]).id == 2


def test_attach_writes_nothing() -> None:
    pair = RingPair()
    pair.send(1)
    before = bytes(pair.page)

    BackRing(pair.page, Abi.X86_64).attach()

    assert bytes(pair.page) == before


def test_attach_refuses_indices_that_make_no_ring() -> None:
    pair = RingPair()
    pair.lie(SRING_REQ_PROD, 40)

    with pytest.raises(PeerProtocolError, match="req_prod 40 is 40 ahead of rsp_prod 0"):
        BackRing(pair.page, Abi.X86_64).attach()


def test_what_was_published_is_not_read_back() -> None:
    pair = RingPair()
    pair.send(1)
    pair.taken()
    pair.back.final_check()
    pair.answer(1)
    pair.answered()
    pair.front.final_check()

    pair.lie(SRING_REQ_PROD, 2)
    assert pair.send(2)
    pair.taken()
    pair.lie(SRING_RSP_PROD, 2)
    assert pair.answer(2)


def test_any_power_of_two_of_slots_will_do() -> None:
    page = memoryview(bytearray(PAGE_SIZE))

    assert FrontRing(page, Abi.X86_64, entries=4).init().free_slots() == 4


@pytest.mark.parametrize("entries", [0, 3, 64])
def test_other_numbers_of_slots_are_refused(entries: int) -> None:
    page = memoryview(bytearray(PAGE_SIZE))

    with pytest.raises(LocalProtocolError, match="do not make a ring"):
        BackRing(page, Abi.X86_64, entries=entries)


def test_a_view_that_is_too_short_is_refused() -> None:
    with pytest.raises(LocalProtocolError, match="2 ring pages do not fit"):
        BackRing(memoryview(bytearray(PAGE_SIZE)), Abi.X86_64, 2)


@given(
    abi=st.sampled_from(Abi),
    start=st.sampled_from([0, 1, 31, 32, LAST - 32, LAST - 1, LAST]),
    operations=st.lists(
        st.sampled_from(["put", "push", "take", "answer", "publish", "reap"]), max_size=120
    ),
)
def test_every_request_is_taken_once_and_answered_once_in_any_interleaving(
    abi: Abi, start: int, operations: list[str]
) -> None:
    pair = RingPair(abi, start=start)
    sent, taken, answered = 0, deque[int](), list[int]()

    for operation in operations:
        if operation == "put" and pair.front.free_slots():
            pair.front.put_request(read(sent))
            sent += 1
        elif operation == "push":
            pair.front.push()
        elif operation == "take":
            taken.extend(pair.taken())
        elif operation == "answer" and taken:
            pair.back.put_response(Response(RequestId(taken.popleft()), Op.READ))
        elif operation == "publish":
            pair.back.push()
        elif operation == "reap":
            answered.extend(pair.answered())

    assert all(after == before + 1 for before, after in pairwise(answered))
    assert pair.front.outstanding() == sent - len(answered)


@given(page=st.binary(min_size=64, max_size=64), takes=st.integers(0, 70))
def test_no_header_makes_a_backend_take_more_than_a_ring(page: bytes, takes: int) -> None:
    back = BackRing(memoryview(bytearray(page.ljust(PAGE_SIZE, b"\xee"))), Abi.X86_64)

    outcomes = [back.take()[0] for _ in range(takes)]

    assert outcomes.count(Outcome.REQUEST) <= 32
