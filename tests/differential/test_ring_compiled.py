# SPDX-License-Identifier: Apache-2.0
"""The compiled ring against the readable one: same outcomes, same page, byte for byte."""

import random
from typing import Any

import hypothesis.strategies as st
from hypothesis import example, given, settings

from xvd.blkif import ring as reference
from xvd.blkif.abi import Abi, nr_ents
from xvd.blkif.messages import Response
from xvd.dataplane.ring import ring as compiled
from xvd.errors import LocalProtocolError, PeerProtocolError
from xvd.types import PAGE_SIZE, RequestId

WRAP = 1 << 32
NEAR = [0, 1, 2, 31, 32, 33, 63, 64, WRAP - 1, WRAP - 2, WRAP - 32, WRAP - 33, WRAP // 2]
INDEX = st.one_of(st.sampled_from(NEAR), st.integers(0, WRAP - 1))
DELTA = st.one_of(st.integers(-2, 66), INDEX)
WORDS = {"req_prod": 0, "req_event": 1, "rsp_prod": 2, "rsp_event": 3}
U64 = st.integers(0, 2**64 - 1)

POKE = st.tuples(st.just("poke"), st.sampled_from(sorted(WORDS)), DELTA)
BACK = st.one_of(
    st.tuples(st.just("take")),
    st.tuples(st.just("respond"), U64, st.integers(0, 255), st.integers(-32768, 32767)),
    st.tuples(st.just("push")),
    st.tuples(st.just("final_check")),
    st.tuples(st.just("attach")),
    POKE,
)
FRONT = st.one_of(
    st.tuples(st.just("put"), st.binary(min_size=1, max_size=112)),
    st.tuples(st.just("push")),
    st.tuples(st.just("take")),
    st.tuples(st.just("final_check")),
    st.tuples(st.just("free")),
    POKE,
)


def page_of(seed: bytes, base: int, words: list[int]) -> bytearray:
    page = bytearray((seed * (PAGE_SIZE // len(seed) + 1))[:PAGE_SIZE])
    for number, delta in enumerate(words):
        page[4 * number : 4 * number + 4] = ((base + delta) % WRAP).to_bytes(4, "little")
    return page


def poke(page: bytearray, name: str, base: int, delta: int) -> None:
    memoryview(page).cast("I")[WORDS[name]] = (base + delta) % WRAP


class ReferenceBack:
    def __init__(self, page: bytearray, abi: Abi, req_cons: int, rsp_prod_pvt: int) -> None:
        self.abi = abi
        self.ring = reference.BackRing(memoryview(page), abi)
        self.ring.req_cons = req_cons
        self.ring.rsp_prod_pvt = self.ring.rsp_prod = rsp_prod_pvt

    def do(self, name: str, *arguments: Any) -> Any:
        if name == "take":
            outcome, slot = self.ring.take()
            return {0: 0, 1: 1, 3: 2}[outcome], slot
        if name == "respond":
            try:
                self.ring.put_response(Response(RequestId(arguments[0]), *arguments[1:]))
            except LocalProtocolError:
                return "nothing to answer"
            return None
        if name == "attach":
            try:
                self.ring.attach()
            except PeerProtocolError:
                return False
            return True
        return getattr(self.ring, name)()

    @property
    def indices(self) -> tuple[int, int]:
        return self.ring.req_cons, self.ring.rsp_prod_pvt


class CompiledBack:
    def __init__(self, page: bytearray, abi: Abi, req_cons: int, rsp_prod_pvt: int) -> None:
        self.ring = compiled.BackRing(page, nr_ents(1, abi), abi.number)
        self.ring.set_indices(req_cons, rsp_prod_pvt)

    def do(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self.ring, name)(*arguments)
        except LocalProtocolError:
            return "nothing to answer"

    @property
    def indices(self) -> tuple[int, int]:
        return self.ring.indices


class ReferenceFront:
    def __init__(self, page: bytearray, abi: Abi, req_prod_pvt: int, rsp_cons: int) -> None:
        self.abi = abi
        self.ring = reference.FrontRing(memoryview(page), abi)
        self.ring.req_prod_pvt = self.ring.req_prod = req_prod_pvt
        self.ring.rsp_cons = rsp_cons

    def do(self, name: str, *arguments: Any) -> Any:
        if name == "free":
            return self.ring.free_slots()
        if name == "put":
            try:
                self.ring.put_request(arguments[0])
            except LocalProtocolError:
                return "refused"
            return None
        if name == "take":
            outcome, response = self.ring.take_response()
            if response is None:
                return {0: 0, 3: 2}[outcome], None
            return 1, (response.id, response.operation, response.status)
        return getattr(self.ring, name)()

    @property
    def indices(self) -> tuple[int, int]:
        return self.ring.req_prod_pvt, self.ring.rsp_cons


class CompiledFront:
    def __init__(self, page: bytearray, abi: Abi, req_prod_pvt: int, rsp_cons: int) -> None:
        self.abi = abi
        self.ring = compiled.FrontRing(page, nr_ents(1, abi), abi.number)
        self.ring.set_indices(req_prod_pvt, rsp_cons)

    def do(self, name: str, *arguments: Any) -> Any:
        if name == "free":
            return self.ring.free
        if name == "take":
            from xvd.blkif.messages import unpack_response

            outcome, slot = self.ring.take()
            if outcome != 1:
                return outcome, None
            response = unpack_response(self.abi, slot)
            return 1, (response.id, response.operation, response.status)
        try:
            return getattr(self.ring, name)(*arguments)
        except LocalProtocolError:
            return "refused"

    @property
    def indices(self) -> tuple[int, int]:
        return self.ring.indices


def compare(kinds: Any, case: Any) -> None:
    """Do the same to both; everything that can be seen must be the same after each step."""
    abi, seed, base, words, behind, operations = case
    pages = [page_of(seed, base, words) for _ in kinds]
    rings = [
        kind(page, abi, base, (base - behind) % WRAP)
        for kind, page in zip(kinds, pages, strict=True)
    ]
    for name, *arguments in operations:
        if name == "poke":
            for page in pages:
                poke(page, arguments[0], base, arguments[1])
            continue
        outcomes = [ring.do(name, *arguments) for ring in rings]
        assert outcomes[0] == outcomes[1], name
        assert rings[0].indices == rings[1].indices, name
        assert pages[0] == pages[1], name
        if name == "attach" and outcomes[0] is False:
            return  # nobody uses a ring that could not be attached to


def case(operations: Any) -> Any:
    return st.tuples(
        st.sampled_from(list(Abi)), st.binary(min_size=1, max_size=64), INDEX,
        st.lists(DELTA, min_size=4, max_size=4), st.integers(0, 32),
        st.lists(operations, max_size=40),
    )  # fmt: skip


@settings(max_examples=1500)
@given(case(BACK))
@example((Abi.X86_64, b"\0", 0, [WRAP - 1, 0, 0, 0], 32, [("final_check",), ("take",)]))
@example((Abi.X86_32, b"x", WRAP - 1, [1, 0, 0, 0], 0, [("take",), ("push",), ("final_check",)]))
@example((Abi.ARM, b"x", 0, [1, 0, 0, 1], 0,
          [("take",), ("respond", 1, 0, 0), ("poke", "rsp_prod", 1), ("push",)]))  # fmt: skip
def test_the_backends_ends_agree(drawn: Any) -> None:
    compare((ReferenceBack, CompiledBack), drawn)


@settings(max_examples=1500)
@given(case(FRONT))
@example((Abi.X86_64, b"\0", 4, [0, 0, 8, 0], 4, [("take",)] * 6 + [("free",)]))
@example((Abi.ARM, b"\xff", 0, [0, 0, 33, 0], 0, [("take",), ("final_check",)]))
def test_the_frontends_ends_agree(drawn: Any) -> None:
    compare((ReferenceFront, CompiledFront), drawn)


@given(st.sampled_from(list(Abi)))
def test_a_fresh_ring_is_the_same_page(abi: Abi) -> None:
    pages = [bytearray(PAGE_SIZE), bytearray(PAGE_SIZE)]
    reference.FrontRing(memoryview(pages[0]), abi).init()
    compiled.FrontRing(pages[1], nr_ents(1, abi), abi.number).init()
    assert pages[0] == pages[1]


def test_pages_that_are_apart_hold_what_pages_in_one_piece_hold() -> None:
    """A kernel with pages of 64 KiB gives each page of a ring one of its own; entries cross."""
    pages, stride, source = 4, 16 * PAGE_SIZE, random.Random(1)
    for abi in Abi:
        entries = nr_ents(pages, abi)
        whole, apart = bytearray(pages * PAGE_SIZE), bytearray(pages * stride)
        strides = {id(whole): PAGE_SIZE, id(apart): stride}
        ends = [
            (
                compiled.FrontRing(memory, entries, abi.number, stride=strides[id(memory)]),
                compiled.BackRing(memory, entries, abi.number, stride=strides[id(memory)]),
            )
            for memory in (whole, apart)
        ]
        for front, back in ends:
            front.init()
            assert back.attach()
        for _ in range(2 * entries):
            request = source.randbytes(108)
            answer = source.getrandbits(64), source.getrandbits(8), source.getrandbits(15)
            for front, _ in ends:
                front.put(request)
                front.push()
            taken = [back.take() for _, back in ends]
            assert taken[0] == taken[1]
            for _, back in ends:
                back.respond(*answer)
                back.push()
            answered = [front.take() for front, _ in ends]
            assert answered[0] == answered[1]
            assert answered[0][0] == 1
        pieces = [apart[at : at + PAGE_SIZE] for at in range(0, len(apart), stride)]
        assert b"".join(pieces) == whole
        assert not any(
            any(apart[at + PAGE_SIZE : at + stride]) for at in range(0, len(apart), stride)
        )
