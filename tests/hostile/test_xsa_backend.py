# SPDX-License-Identifier: Apache-2.0
"""What became a Xen security advisory in some backend, tried on this one; one test for each.

In every way of moving data where it makes a difference. XSA-332 is in test_event_storm.py, XSA-349
and XSA-350 are in tests/backend/test_life_cycle.py: those need a whole device.
"""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from rig_disk import disk_world, run
from rig_engines import ByHand
from rig_guest import RawFrontend, backend_error, backend_reaches
from rig_queue import ALL, QueueWorld, bad_gref, discard, rq

from xvd.backend.settings import Settings
from xvd.blkif.abi import Abi, Op, Status
from xvd.blkif.messages import Segment, pack_request

WAYS: dict[str, dict[str, Any]] = {
    "map": {}, "copy": {"copying": True}, "persistent": {"persistent": 1056},
    "persistent, over the limit": {"persistent": 2},
}  # fmt: skip
EVERY_WAY = pytest.mark.parametrize("way", list(WAYS))
ABIS = pytest.mark.parametrize("abi", list(Abi), ids=lambda abi: abi.name)
OFFERED = ALL | 1 << Op.WRITE_BARRIER


@EVERY_WAY
@pytest.mark.parametrize("operation", [Op.WRITE, Op.WRITE_BARRIER, Op.FLUSH_DISKCACHE])
def test_cve_2013_2140_nothing_changes_a_read_only_disk(way: str, operation: Op) -> None:
    with QueueWorld(read_only=True, offered=OFFERED, indirect_max=32, **WAYS[way]) as world:
        answers = world.ask(
            rq(operation, 0, world.segment(0), id=1), discard(0, 8, id=2),
            world.indirect(Op.WRITE, 0, [world.segment(0)] * 12, id=3),
        )  # fmt: skip
        assert {answer.id: answer.status for answer in answers} == {
            1: Status.ERROR, 2: Status.ERROR, 3: Status.ERROR,
        }  # fmt: skip
        assert world.queue.counters()["mapped"] == 0


@EVERY_WAY
@ABIS
def test_xsa_155_and_197_a_slot_that_changes_all_the_time(way: str, abi: Abi) -> None:
    """Whatever was seen is one request, judged as a whole, and has one answer."""
    with QueueWorld(abi=abi, offered=OFFERED, indirect_max=32, **WAYS[way]) as world:
        stop = threading.Event()
        good = pack_request(abi, rq(Op.READ, 0, world.segment(0), id=1))
        bad = pack_request(abi, rq(Op.WRITE, 1 << 60, *[Segment(bad_gref(), 7, 255)] * 11, id=1))
        first = world.ring_pages.view[64 : 64 + abi.entry_size]

        def rewrite() -> None:
            while not stop.is_set():
                first[:] = good
                first[0:2] = bytes([Op.INDIRECT, 255])
                first[:] = bad

        thread = threading.Thread(target=rewrite)
        thread.start()
        try:
            for _ in range(50):
                answers = len(world.ask(*[rq(Op.READ, 0, world.segment(0), id=1)] * 32))
                assert answers == 32
        finally:
            stop.set()
            thread.join()
        [answer] = world.ask(rq(Op.READ, 0, world.segment(0), id=77))
        assert (answer.id, world.queue.in_flight) == (77, 0)


@ABIS
@pytest.mark.parametrize("kind", ["indirect", "barrier", "discard", "unknown", "refused"])
def test_xsa_216_no_answer_carries_anything_but_its_three_fields(abi: Abi, kind: str) -> None:
    with QueueWorld(abi=abi, poison=0xA5, offered=OFFERED, indirect_max=32) as world:
        slot = {
            "indirect": pack_request(abi, world.indirect(Op.READ, 0, [world.segment(0)] * 12)),
            "barrier": pack_request(abi, rq(Op.WRITE_BARRIER)),
            "discard": pack_request(abi, discard(0, 8)),
            "unknown": b"\xfe" * 24,
            "refused": pack_request(abi, rq(Op.READ, 1 << 60, world.segment(0))),
        }[kind]
        world.send(slot)
        world.settle()
        written = bytes(world.ring_pages.view[64 : 64 + abi.entry_size])
        assert written[9] == slot[9]
        assert written[12 : len(slot)] == slot[12:]
        assert set(written[len(slot) :]) <= {0xA5}


@EVERY_WAY
def test_xsa_229_pages_that_follow_each_other_by_number_only_are_not_one_buffer(way: str) -> None:
    """References and ring order say nothing of where pages lie."""
    with QueueWorld(**WAYS[way]) as world:
        for page in range(8):
            world.data(page)[:] = bytes([page + 1]) * 4096
        for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2, 7, 6, 5, 4]):
            world.ask(rq(Op.WRITE, 0, *(world.segment(page) for page in order)))
            stored = bytes(world.engine.lower.view[: len(order) * 4096])  # type: ignore[attr-defined]
            assert stored == b"".join(bytes([page + 1]) * 4096 for page in order)


@EVERY_WAY
@pytest.mark.parametrize("position", range(0, 26, 5))
def test_xsa_361_and_365_any_mapping_of_a_batch_may_fail(way: str, position: int) -> None:
    """CVE-2021-26930: blkback went on with what had not been mapped."""
    engine = ByHand(1 << 20)
    with QueueWorld(engine, indirect_max=32, **WAYS[way]) as world:
        world.grants.inject([0] * position + [-1])
        segments = [world.segment(page) for page in range(24)]
        world.send(
            world.indirect(Op.WRITE, 0, segments[:12], id=1),
            world.indirect(Op.WRITE, 96, segments[12:], id=2, first=1),
            rq(Op.WRITE, 192, *(world.segment(page) for page in range(24, 30)), id=3),
        )  # fmt: skip
        world.settle()
        operations = engine.channel.take()
        begun = len(operations)
        for operation in operations:
            assert sum(len(buffer) for buffer in operation.buffers()) == operation.length
            operation.complete()
        world.settle()
        failed = [a.id for a in world.responses() if a.status != Status.OKAY]
        assert (begun, len(failed)) == (2, 1)
        world.queue.release()
        assert all(world.pages.revoke(page) for page in range(30))


@pytest.mark.parametrize("page", range(4))
def test_xsa_362_a_ring_of_which_a_page_cannot_be_mapped(
    page: int, expect_log: Callable[[str], None]
) -> None:
    """The ring is one mapping: all of its pages or none."""
    expect_log("cannot connect to")

    async def work() -> None:
        async with disk_world(settings=Settings(max_queues=1)) as world:
            vbd = await world.attach()
            machine, store = await world.guest()
            frontend = RawFrontend(machine, store, vbd, order=2)
            await frontend.publish({f"ring-ref{page}": "1999"})
            await backend_reaches(world, vbd, 6)
            assert "cannot map" in await backend_error(world, vbd)
            assert all(frontend.ring_pages.revoke(number) for number in range(4))
            frontend.close()

    run(work())


def test_xsa_403_a_guest_never_reads_what_another_request_left_in_a_buffer() -> None:
    """With grant copy data goes through pages of ours, which others have used before."""
    engine = ByHand(1 << 20)
    with QueueWorld(engine, copying=True) as world:
        world.data(0)[:] = b"s" * 4096
        world.send(rq(Op.WRITE, 0, world.segment(0)))
        world.settle()
        engine.channel.take()[0].complete()
        world.settle()
        world.data(1)[:] = b"g" * 4096
        world.send(rq(Op.READ, 8, world.segment(1)), rq(Op.READ, 8, world.segment(1, 2, 3)))
        world.settle()
        first, second = engine.channel.take()
        first.complete(5)
        second.buffers()[0][:] = b"r" * 1024
        second.complete()
        world.settle()
        assert bytes(world.data(1)) == b"g" * 1024 + b"r" * 1024 + b"g" * 2048
