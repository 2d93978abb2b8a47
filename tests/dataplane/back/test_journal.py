# SPDX-License-Identifier: Apache-2.0
"""A journal that a successor finds: its own ring's, another's, or damaged in any way."""

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rig_engines import ByHand
from rig_queue import QueueWorld, rq

from xvd.blkif.abi import RING_HEADER_SIZE, Op
from xvd.dataplane.back.journal import journal_fault, journal_size, unanswered
from xvd.engines.bridge import Operation
from xvd.errors import PeerProtocolError

HEADER = ENTRY = 128
REQ_CONS, RSP_PROD = 8, 12
SIZE = 1 << 20
ENTRIES = 32


def in_flight(world: QueueWorld, count: int) -> None:
    """Requests that were taken and that nobody will answer."""
    world.send(*(rq(Op.WRITE, 8 * i, world.segment(i), id=i) for i in range(count)))
    world.queue.step()
    assert world.queue.in_flight == count


def taken_by_storage(world: QueueWorld) -> list[Operation]:
    assert isinstance(world.engine, ByHand)
    return world.engine.channel.take()


def fault(world: QueueWorld) -> str:
    return journal_fault(world.journal, world.mapping.view, ENTRIES, world.abi.number)


def entry_of(world: QueueWorld, request: int) -> int:
    """Where the entry of the request with this id lies."""
    for at in range(HEADER, len(world.journal), ENTRY):
        word, index = struct.unpack_from("<II", world.journal, at)
        if word and index == request:
            return at
    raise AssertionError(f"request {request} is not in the journal")


def add(world: QueueWorld, offset: int, difference: int) -> None:
    (value,) = struct.unpack_from("<I", world.journal, offset)
    struct.pack_into("<I", world.journal, offset, value + difference & 0xFFFF_FFFF)


def test_what_a_killed_backend_leaves_has_no_fault() -> None:
    with QueueWorld(ByHand(SIZE)) as world:
        in_flight(world, 5)

        assert fault(world) == ""
        world.queue.abandon()


def test_a_request_that_was_being_taken_is_executed_once() -> None:
    # Killed between the entry's word and the index that counts it.
    with QueueWorld(ByHand(SIZE)) as world:
        in_flight(world, 3)
        add(world, REQ_CONS, -1)

        world.succeed()
        world.queue.step()

        assert world.queue.counters()["recovered"] == 3
        assert world.queue.step() == 0
        world.queue.abandon()


def sealed_answer(taken: int, rsp_index: int, status: int) -> int:
    """The word of an entry that is being answered, by the rule in journal.pxd."""
    mask, factor = (1 << 64) - 1, 0x9E37_79B9_7F4A_7C15
    mixed = ((taken << 32) ^ rsp_index) * factor & mask
    mixed = (mixed ^ (status & 0xFFFF)) * factor & mask
    return mixed >> 32 & ~3 | 2


@pytest.mark.parametrize("counted", [False, True])
def test_an_answer_that_was_being_given_is_given_once(counted: bool) -> None:
    # Killed between the entry that says so and the index, or between the index and the entry.
    with QueueWorld(ByHand(SIZE)) as world:
        in_flight(world, 1)
        at = entry_of(world, 0)
        (taken,) = struct.unpack_from("<I", world.journal, at)
        struct.pack_into("<IIIh", world.journal, at, sealed_answer(taken, 0, -1), 0, 0, -1)
        if counted:
            add(world, RSP_PROD, 1)
            struct.pack_into("<QBxh", world.mapping.view, RING_HEADER_SIZE, 0, Op.WRITE, -1)

        world.succeed()
        world.queue.step()

        assert [(answer.id, answer.status) for answer in world.responses()] == [(0, -1)]
        assert world.queue.in_flight == 0


@pytest.mark.parametrize(
    ("offset", "difference", "reason"),
    [
        (0, 1, "does not begin as a journal does"),
        (4, 32, "a ring of another size"),
        (16, 1, "of another ring"),
        (REQ_CONS, 100_000, "further apart than the ring is long"),
        (REQ_CONS, 5, "not those between its indices"),
        (RSP_PROD, 3, "further apart than the ring is long"),
    ],
)
def test_a_damaged_header_is_not_believed(offset: int, difference: int, reason: str) -> None:
    with QueueWorld(ByHand(SIZE)) as world:
        in_flight(world, 2)
        add(world, offset, difference)

        assert reason in fault(world)
        with pytest.raises(PeerProtocolError, match=reason):
            world.succeed()


def test_a_request_that_was_answered_long_ago_is_not_believed_again() -> None:
    with QueueWorld(ByHand(SIZE)) as world:
        in_flight(world, 1)
        at = entry_of(world, 0)
        old = bytes(world.journal[at : at + ENTRY])
        for operation in taken_by_storage(world):
            operation.complete()
        world.settle()
        world.journal[at : at + ENTRY] = old

        assert "not those between its indices" in fault(world)


def test_a_journal_of_another_ring_is_not_believed() -> None:
    # The next ring of the same pages: a frontend clears the instance's number when it makes one.
    with QueueWorld(ByHand(SIZE)) as world:
        in_flight(world, 3)
        world.ring.init()

        assert "of another ring" in fault(world)
        world.queue.abandon()


def test_a_journal_cut_short_is_not_believed() -> None:
    with QueueWorld(ByHand(SIZE)) as world:
        in_flight(world, 1)
        whole = journal_size(ENTRIES)

        short = [
            journal_fault(world.journal[:size], world.mapping.view, ENTRIES, world.abi.number)
            for size in (0, 1, HEADER, whole - 1)
        ]

        assert short == ["it is empty"] + ["it is too short for the ring"] * 3
        world.queue.abandon()


def test_indices_that_the_ring_contradicts_are_not_believed() -> None:
    with QueueWorld(ByHand(SIZE)) as world:
        in_flight(world, 4)
        struct.pack_into("<I", world.mapping.view, 0, 2)  # req_prod: fewer than were taken

        assert "not between those of the ring" in fault(world)
        world.queue.abandon()


@given(bit=st.integers(0, (HEADER + 4 * ENTRY) * 8 - 1), count=st.integers(1, 4))
def test_no_turned_bit_changes_what_is_executed(bit: int, count: int) -> None:
    """Whichever bit of a journal is turned over, a successor executes just what was in flight, or
    does not take the journal up."""
    with QueueWorld(ByHand(SIZE)) as world:
        in_flight(world, count)
        at = min(entry_of(world, i) for i in range(count))
        byte = bit // 8 if bit < HEADER * 8 else at + bit // 8 - HEADER
        if byte < len(world.journal):
            world.journal[byte] ^= 1 << bit % 8
        asked = sorted(operation.offset for operation in taken_by_storage(world))

        try:
            world.succeed()
        except PeerProtocolError:
            world.queue.abandon()
            return
        world.queue.step()

        again = sorted(operation.offset for operation in taken_by_storage(world))
        assert again == asked
        world.queue.abandon()


def test_random_bytes_are_never_believed() -> None:
    drawn = random.Random(7)
    with QueueWorld(ByHand(SIZE)) as world:
        in_flight(world, 2)
        for _ in range(200):
            world.journal[HEADER:] = drawn.randbytes(len(world.journal) - HEADER)
            assert fault(world)
        world.queue.abandon()


def test_what_is_unanswered_is_told_by_the_ring() -> None:
    with QueueWorld() as world:
        world.send(rq(Op.READ, 0, world.segment(0)), rq(Op.READ, 0, world.segment(1)))

        assert unanswered(world.mapping.view) == 2
