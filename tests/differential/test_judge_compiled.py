# SPDX-License-Identifier: Apache-2.0
"""The compiled judge of requests against the readable one, over random and boundary slots."""

import itertools
import random

import pytest

from xvd.blkif.abi import DISCARD, INDIRECT, REQUEST, SEGMENT, Abi, Op, Status
from xvd.blkif.messages import IndirectRequest, unpack_request, unpack_segments
from xvd.blkif.validate import Limits, Refusal, answer, validate
from xvd.dataplane.back.request import judge

EXAMPLES = 4000  # for each ABI
OFFERS = list(itertools.product([False, True], repeat=3))
CAPACITIES = [0, 1, 8, 2048, 2**32, 2**54, 2**63]
NUMBERS = [0, 1, 7, 8, 9, 2040, 2041, 2047, 2048, 2**32 - 1, 2**63, 2**64 - 8, 2**64 - 1]


def put(slot: bytearray, at: int, size: int, value: int) -> None:
    slot[at : at + size] = value.to_bytes(size, "little")


def draw_slot(rng: random.Random, abi: Abi) -> bytes:
    """Noise, with fields at their boundaries more often than not."""
    slot = bytearray(rng.randbytes(abi.entry_size))
    slot[0] = rng.choice([0, 0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 6, 6, 7, 255, slot[0]])
    slot[1] = rng.choice([0, 1, 2, 10, 11, 11, 12, 255, slot[1]])
    if slot[0] == Op.INDIRECT:
        slot[1] = rng.choice([0, 0, 0, 1, 1, 1, 2, 6, 255])
        count = rng.choice([0, 1, 11, 12, 31, 32, 33, 511, 512, 513, 4096, 4097, 65535])
        put(slot, abi.offset(INDIRECT, "nr_segments"), 2, count)
        put(slot, abi.offset(INDIRECT, "sector_number"), 8, rng.choice(NUMBERS))
        return bytes(slot)
    struct = DISCARD if slot[0] == Op.DISCARD else REQUEST
    put(slot, abi.offset(struct, "sector_number"), 8, rng.choice(NUMBERS))
    if slot[0] == Op.DISCARD:
        put(slot, abi.offset(DISCARD, "nr_sectors"), 8, rng.choice(NUMBERS))
        return bytes(slot)
    draw_segments(rng, slot, abi.offset(REQUEST, "seg"), 11, 0.1)
    return bytes(slot)


def draw_segments(
    rng: random.Random, memory: bytearray, at: int, count: int, oddity: float
) -> None:
    """Mostly good segments, mostly whole pages; now and then one at a boundary."""
    for number in range(at, at + count * Abi.X86_64.size(SEGMENT), Abi.X86_64.size(SEGMENT)):
        if rng.random() < 0.95:
            first = rng.randrange(8)
            memory[number + 4], memory[number + 5] = first, rng.randrange(first, 8)
        if rng.random() < oddity:
            odd = rng.choice([(0, 8), (1, 0), (7, 7), (8, 8), (0, 255)])
            memory[number + 4], memory[number + 5] = odd


def draw_pages(rng: random.Random, abi: Abi, slot: bytes) -> bytes:
    """What the indirect pages of a request hold; nothing where it has none."""
    request = unpack_request(abi, slot)
    if not isinstance(request, IndirectRequest):
        return b""
    memory = bytearray(rng.randbytes(request.nr_segments * abi.size(SEGMENT)))
    if rng.random() < 0.5:
        memory = bytearray(b"\0\0\0\0\0\7\0\0" * request.nr_segments)
    else:
        count = request.nr_segments
        draw_segments(rng, memory, 0, count, rng.choice([0, 1 / (count + 1)]))
    return bytes(memory)


def readable(abi: Abi, slot: bytes, limits: Limits, pages: bytes) -> tuple[Refusal, int, int]:
    """What the readable judge says, and the operation and the id of the answer."""
    request = unpack_request(abi, slot)
    refusal = validate(request, limits)
    if isinstance(request, IndirectRequest) and refusal is Refusal.NONE:
        refusal = validate(request, limits, unpack_segments(pages, request.nr_segments))
    response = answer(request, Status.OKAY)
    return refusal, response.operation, response.id


def bits(limits: Limits) -> int:
    offered = 1 << Op.READ | 1 << Op.WRITE | limits.flush << Op.FLUSH_DISKCACHE
    offered |= limits.barrier << Op.WRITE_BARRIER | limits.discard << Op.DISCARD
    offered |= bool(limits.indirect_max) << Op.INDIRECT
    return offered | limits.secure_discard << 16


@pytest.mark.parametrize("abi", list(Abi), ids=lambda abi: abi.name)
def test_both_judges_say_the_same(abi: Abi) -> None:
    rng = random.Random(f"judges of {abi.name}")
    seen = set()
    for _ in range(EXAMPLES):
        slot = draw_slot(rng, abi)
        flush, barrier, discard = rng.choice(OFFERS)
        limits = Limits(
            capacity=rng.choice(CAPACITIES),
            block_sectors=rng.choice([1, 1, 8]),
            wire_sector=rng.choice([1, 1, 2, 8]),
            read_only=rng.random() < 0.3,
            flush=flush,
            barrier=barrier,
            discard=discard,
            secure_discard=discard and rng.random() < 0.5,
            indirect_max=rng.choice([0, 12, 32, 256, 4096]),
        )
        pages = draw_pages(rng, abi, slot)
        wanted = readable(abi, slot, limits, pages)
        found, operation, request_id = judge(
            slot, abi.number, capacity=limits.capacity, block_sectors=limits.block_sectors,
            wire_sector=limits.wire_sector, read_only=limits.read_only, offered=bits(limits),
            indirect_max=limits.indirect_max, pages=pages,
        )  # fmt: skip
        assert (Refusal(found), operation, request_id) == wanted, slot.hex()
        seen.add(wanted[0])
    assert seen == set(Refusal) - {Refusal.BAD_GRANT}


@pytest.mark.parametrize("operation", range(256))
def test_every_operation_is_judged_alike(operation: int) -> None:
    slot = bytes([operation, 0]) + bytes(110)
    limits = Limits(
        capacity=8, flush=True, barrier=True, discard=True, secure_discard=True, indirect_max=32
    )
    found, _, _ = judge(slot, 0, capacity=8, offered=bits(limits), indirect_max=32)
    assert Refusal(found) is validate(unpack_request(Abi.X86_64, slot), limits)


@pytest.mark.parametrize("operation", range(256))
def test_every_inner_operation_is_judged_alike(operation: int) -> None:
    slot = bytes([Op.INDIRECT, operation, 12, 0]) + bytes(108)
    limits = Limits(capacity=8, indirect_max=32)
    found, named, _ = judge(slot, 0, capacity=8, offered=bits(limits), indirect_max=32)
    assert Refusal(found) is validate(unpack_request(Abi.X86_64, slot), limits)
    assert named == operation
