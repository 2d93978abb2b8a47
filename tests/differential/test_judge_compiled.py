# SPDX-License-Identifier: Apache-2.0
"""The compiled judge of requests against the readable one, over random and boundary slots."""

import itertools
import random

import pytest

from xvd.blkif.abi import DISCARD, REQUEST, SEGMENT, Abi, Op
from xvd.blkif.messages import unpack_request
from xvd.blkif.validate import Limits, Refusal, validate
from xvd.dataplane.request import judge

EXAMPLES = 4000  # for each ABI
OFFERS = list(itertools.product([False, True], repeat=3))
CAPACITIES = [0, 1, 8, 2048, 2**32, 2**54, 2**63]
NUMBERS = [0, 1, 7, 8, 9, 2040, 2041, 2047, 2048, 2**32 - 1, 2**63, 2**64 - 8, 2**64 - 1]


def put(slot: bytearray, at: int, size: int, value: int) -> None:
    slot[at : at + size] = value.to_bytes(size, "little")


def draw_slot(rng: random.Random, abi: Abi) -> bytes:
    """Noise, with fields at their boundaries more often than not."""
    slot = bytearray(rng.randbytes(abi.entry_size))
    slot[0] = rng.choice([0, 0, 1, 1, 2, 3, 3, 4, 5, 5, 7, 255, slot[0]])
    slot[1] = rng.choice([0, 1, 2, 10, 11, 11, 12, 255, slot[1]])
    if slot[0] == Op.INDIRECT:
        slot[0] = Op.READ
    struct = DISCARD if slot[0] == Op.DISCARD else REQUEST
    put(slot, abi.offset(struct, "sector_number"), 8, rng.choice(NUMBERS))
    if slot[0] == Op.DISCARD:
        put(slot, abi.offset(DISCARD, "nr_sectors"), 8, rng.choice(NUMBERS))
        return bytes(slot)
    for number in range(11):
        at = abi.offset(REQUEST, "seg") + number * abi.size(SEGMENT)
        if rng.random() < 0.95:
            first = rng.randrange(8)
            slot[at + 4], slot[at + 5] = first, rng.randrange(first, 8)
        if rng.random() < 0.1:
            slot[at + 4], slot[at + 5] = rng.choice([(0, 8), (1, 0), (7, 7), (8, 8), (0, 255)])
    return bytes(slot)


def bits(limits: Limits) -> int:
    offered = 1 << Op.READ | 1 << Op.WRITE | limits.flush << Op.FLUSH_DISKCACHE
    offered |= limits.barrier << Op.WRITE_BARRIER | limits.discard << Op.DISCARD
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
            logical_sectors=rng.choice([1, 1, 8]),
            read_only=rng.random() < 0.3,
            flush=flush,
            barrier=barrier,
            discard=discard,
            secure_discard=discard and rng.random() < 0.5,
        )
        request = unpack_request(abi, slot)
        wanted = validate(request, limits)
        found, operation, request_id = judge(
            slot, abi.number, capacity=limits.capacity, logical_sectors=limits.logical_sectors,
            read_only=limits.read_only, offered=bits(limits),
        )  # fmt: skip
        assert (Refusal(found), operation, request_id) == (wanted, slot[0], request.id), slot.hex()
        seen.add(wanted)
    never = {Refusal.INDIRECT_OPERATION, Refusal.BAD_GRANT}
    assert seen == set(Refusal) - never


@pytest.mark.parametrize("operation", range(256))
def test_every_operation_is_judged_alike(operation: int) -> None:
    slot = bytes([operation, 0]) + bytes(110)
    limits = Limits(capacity=8, flush=True, barrier=True, discard=True, secure_discard=True)
    found, _, _ = judge(slot, 0, capacity=8, offered=bits(limits))
    assert Refusal(found) is validate(unpack_request(Abi.X86_64, slot), limits)
