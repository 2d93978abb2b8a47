# SPDX-License-Identifier: Apache-2.0
"""A backend queue, stepped by hand: what each kind of request does, and what is counted."""

import errno
import select
from dataclasses import replace

import pytest
from rig_engines import ByHand
from rig_queue import ALL, BROKEN, DRAINED, WORKED, QueueWorld, discard, rq

from xvd.blkif.abi import Abi, Op, Status
from xvd.blkif.messages import AnyRequest, Request, Segment
from xvd.blkif.operations import OFFER_SECURE
from xvd.dataplane.back.options import BackOptions
from xvd.dataplane.back.queue import BackendQueue
from xvd.engines.layers.error import Error
from xvd.engines.memory import MemoryEngine
from xvd.engines.uri import open_engine
from xvd.errors import LocalProtocolError, PeerProtocolError
from xvd.types import Gref

MODES = pytest.mark.parametrize("copying", [False, True], ids=["map", "copy"])
ABIS = pytest.mark.parametrize("abi", list(Abi), ids=lambda abi: abi.name)


@MODES
@ABIS
def test_what_is_written_is_read_again(abi: Abi, copying: bool) -> None:
    with QueueWorld(abi=abi, copying=copying) as world:
        world.data(0)[:] = bytes(range(256)) * 16
        answers = world.ask(
            rq(Op.WRITE, 8, world.segment(0), id=1), rq(Op.READ, 8, world.segment(1), id=2)
        )
        assert [(a.id, a.operation, a.status) for a in answers] == [(1, 1, 0), (2, 0, 0)]
        assert bytes(world.data(1)) == bytes(range(256)) * 16


@MODES
def test_a_request_gathers_parts_of_pages_in_order(copying: bool) -> None:
    with QueueWorld(copying=copying) as world:
        world.data(0)[512:1024] = b"a" * 512
        world.data(1)[3584:] = b"b" * 512
        world.data(2)[:1024] = b"c" * 1024
        parts = (world.segment(0, 1, 1), world.segment(1, 7, 7), world.segment(2, 0, 1))
        [answer] = world.ask(rq(Op.WRITE, 3, *parts))
        assert answer.status == Status.OKAY
        world.ask(rq(Op.READ, 3, world.segment(5, 2, 5)))
        assert bytes(world.data(5)[1024:3072]) == b"a" * 512 + b"b" * 512 + b"c" * 1024


@MODES
def test_eleven_segments_of_the_same_page_are_legal(copying: bool) -> None:
    with QueueWorld(copying=copying) as world:
        [answer] = world.ask(rq(Op.WRITE, 0, *[world.segment(0)] * 11))
        assert answer.status == Status.OKAY


def test_a_flush_without_data_is_answered() -> None:
    with QueueWorld() as world:
        [answer] = world.ask(rq(Op.FLUSH_DISKCACHE, 123456789))
        assert (answer.operation, answer.status) == (Op.FLUSH_DISKCACHE, Status.OKAY)


@MODES
def test_a_flush_with_data_flushes_first_and_then_writes(copying: bool) -> None:
    with QueueWorld(copying=copying) as world:
        world.data(0)[:512] = b"f" * 512
        [answer] = world.ask(rq(Op.FLUSH_DISKCACHE, 9, world.segment(0, 0, 0)))
        assert (answer.operation, answer.status) == (Op.FLUSH_DISKCACHE, Status.OKAY)
        world.ask(rq(Op.READ, 9, world.segment(1, 0, 0)))
        assert bytes(world.data(1)[:512]) == b"f" * 512


def test_a_discarded_range_of_memory_reads_as_zeros() -> None:
    with QueueWorld() as world:
        world.data(0)[:] = b"d" * 4096
        world.ask(rq(Op.WRITE, 0, world.segment(0)))
        answers = world.ask(discard(0, 4, id=5), rq(Op.READ, 0, world.segment(1), id=6))
        assert [(a.id, a.operation, a.status) for a in answers] == [(5, 5, 0), (6, 0, 0)]
        assert bytes(world.data(1)) == bytes(2048) + b"d" * 2048


def test_a_discard_of_nothing_is_okay() -> None:
    with QueueWorld() as world:
        [answer] = world.ask(discard(8, 0))
        assert answer.status == Status.OKAY


def test_all_64_bits_of_the_id_come_back() -> None:
    with QueueWorld() as world:
        [answer] = world.ask(rq(Op.FLUSH_DISKCACHE, id=0xFEDC_BA98_7654_3210))
        assert answer.id == 0xFEDC_BA98_7654_3210


@pytest.mark.parametrize(
    ("offered", "indirect_max"),
    [(ALL | 1 << Op.INDIRECT, 0), (ALL, 32), (ALL | 1 << Op.INDIRECT, 4097)],
)
def test_what_a_queue_cannot_do_cannot_be_offered(offered: int, indirect_max: int) -> None:
    with QueueWorld() as world:
        options = BackOptions(capacity=8, offered=offered, indirect_max=indirect_max)
        with pytest.raises(LocalProtocolError, match=r"offered|at most 4096"):
            world.link.prepare(world.channel, options)


def test_a_ring_that_is_too_short_is_refused() -> None:
    with QueueWorld() as world:
        with pytest.raises(LocalProtocolError, match="too few for 64 entries"):
            BackendQueue(
                world.mapping.view, 64, 0, world.grants, world.backend_port, world.channel,
                BackOptions(capacity=8),
            )  # fmt: skip


def test_a_queue_attaches_to_a_live_ring_and_serves_what_waits() -> None:
    with QueueWorld() as world:
        world.send(rq(Op.READ, 0, world.segment(0), id=1), rq(Op.READ, 0, world.segment(1), id=2))
        world.queue = world.link.prepare(world.channel, BackOptions(capacity=64))
        world.settle()
        assert [answer.id for answer in world.responses()] == [1, 2]


def test_an_insane_ring_is_not_attached_to() -> None:
    with QueueWorld() as world:
        world.ring_pages.view.cast("I")[0] = 33
        with pytest.raises(PeerProtocolError, match="more requests on the ring than its 32"):
            world.link.prepare(world.channel, BackOptions(capacity=64))


def test_a_step_takes_no_more_than_its_budget() -> None:
    with QueueWorld() as world:
        world.send(*(rq(Op.FLUSH_DISKCACHE, id=i) for i in range(10)))
        flags = world.queue.step(4)
        assert flags == WORKED
        assert [answer.id for answer in world.responses()] == [0, 1, 2, 3]


def test_a_full_ring_is_served_many_times_over() -> None:
    with QueueWorld() as world:
        for turn in range(5):
            answers = world.ask(*(rq(Op.FLUSH_DISKCACHE, id=turn * 32 + i) for i in range(32)))
            assert [answer.id for answer in answers] == list(range(turn * 32, turn * 32 + 32))


def test_counters_have_blkbacks_names() -> None:
    with QueueWorld() as world:
        world.ask(
            rq(Op.WRITE, 0, world.segment(0)), rq(Op.READ, 0, world.segment(0, 0, 3)),
            rq(Op.FLUSH_DISKCACHE), discard(0, 8), rq(Op.READ, 0),
        )  # fmt: skip
        counters = world.queue.counters()
        wanted = {"rd_req": 1, "wr_req": 1, "f_req": 1, "ds_req": 1, "rd_sect": 4, "wr_sect": 8}
        assert {name: counters[name] for name in wanted} == wanted
        assert counters["requests"] == counters["responses"] == 5
        assert (counters["errors"], counters["refusals"]) == (1, {"no_segments": 1})


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        (rq(Op.READ, 0, Segment(Gref(8))), "read"),
        (rq(Op.WRITE, 0, Segment(Gref(8))), "write"),
        (rq(Op.FLUSH_DISKCACHE), "flush"),
        (rq(Op.WRITE_BARRIER), "flush"),
        (discard(0, 8), "discard"),
    ],
)
@pytest.mark.parametrize(("ns", "bucket"), [(0, 0), (1, 0), (2, 1), (1023, 9), (1024, 10)])
def test_latencies_are_counted_by_kind_in_powers_of_two(
    request_: AnyRequest, kind: str, ns: int, bucket: int
) -> None:
    engine = ByHand(1 << 20)
    with QueueWorld(engine, offered=ALL | 1 << Op.WRITE_BARRIER) as world:
        if isinstance(request_, Request) and request_.segments:
            request_ = replace(request_, segments=(world.segment(0),))
        world.queue.set_time(5000)
        world.send(request_)
        world.settle()
        world.queue.set_time(5000 + ns)
        engine.channel.take()[0].complete()
        world.settle()
        counters = world.queue.counters()
        expected = {name: [0] * 40 for name in ("read", "write", "flush", "discard")}
        expected[kind][bucket] = 1
        assert counters["latency"] == expected
        assert counters["latency_ns"] == dict.fromkeys(expected, 0) | {kind: ns}


def test_what_takes_very_long_is_in_the_last_bucket() -> None:
    engine = ByHand(1 << 20)
    with QueueWorld(engine) as world:
        world.queue.set_time(0)
        world.send(rq(Op.FLUSH_DISKCACHE))
        world.settle()
        world.queue.set_time(1 << 50)
        engine.channel.take()[0].complete()
        world.settle()
        latency = world.queue.counters()["latency"]
        assert latency["flush"][39] == 1  # type: ignore[index]


def test_a_refused_request_has_no_latency() -> None:
    with QueueWorld() as world:
        world.ask(rq(Op.READ, 1 << 40, world.segment(0)))
        latency = world.queue.counters()["latency"]
        assert sum(map(sum, latency.values())) == 0  # type: ignore[attr-defined]


@pytest.mark.beyond_xen("mapping")
def test_one_call_maps_for_all_requests_of_a_step() -> None:
    with QueueWorld() as world:
        world.ask(*(rq(Op.READ, 0, world.segment(i), id=i) for i in range(8)))
        counters = world.queue.counters()
        assert (counters["map_calls"], counters["unmap_calls"], counters["mapped"]) == (1, 1, 8)


@MODES
def test_every_page_mapped_is_unmapped_before_the_response(copying: bool) -> None:
    with QueueWorld(copying=copying) as world:
        world.ask(rq(Op.READ, 0, world.segment(0), world.segment(1)))
        assert [world.pages.revoke(page) for page in (0, 1)] == [True, True]
        counters = world.queue.counters()
        assert counters["mapped"] == counters["unmapped"] == (0 if copying else 2)
        assert counters["copied"] == (2 if copying else 0)


def test_a_frontend_that_asked_for_no_event_gets_none() -> None:
    with QueueWorld() as world:
        world.ask(rq(Op.FLUSH_DISKCACHE))
        world.ask(rq(Op.FLUSH_DISKCACHE))
        counters = world.queue.counters()
        assert (counters["notified"], counters["suppressed"]) == (1, 1)


def test_may_sleep_asks_for_an_event_and_looks_again() -> None:
    with QueueWorld() as world:
        world.ask(rq(Op.FLUSH_DISKCACHE))
        assert world.queue.may_sleep()
        world.ring.put_request(rq(Op.FLUSH_DISKCACHE))
        assert world.ring.push()
        assert not world.queue.may_sleep()


def test_a_stopped_queue_takes_nothing_and_is_drained() -> None:
    with QueueWorld() as world:
        world.queue.stop()
        world.send(rq(Op.FLUSH_DISKCACHE))
        assert world.queue.step() == DRAINED
        assert world.responses() == []


def test_a_broken_queue_says_so_for_ever() -> None:
    with QueueWorld() as world:
        world.ring_pages.view.cast("I")[0] = 1000
        assert world.queue.step() == BROKEN | DRAINED
        world.ring_pages.view.cast("I")[0] = 0
        assert world.queue.step() == BROKEN | DRAINED
        assert world.queue.broken


def test_a_smaller_capacity_holds_from_the_next_request_on() -> None:
    with QueueWorld() as world:
        world.queue.set_capacity(8)
        answers = world.ask(
            rq(Op.READ, 0, world.segment(0), id=1), rq(Op.READ, 1, world.segment(0), id=2)
        )
        assert {answer.id: answer.status for answer in answers} == {1: Status.OKAY, 2: Status.ERROR}


def test_what_is_withdrawn_is_refused_from_then_on() -> None:
    with QueueWorld() as world:
        world.queue.withdraw(1 << Op.FLUSH_DISKCACHE)
        world.refused(rq(Op.FLUSH_DISKCACHE), "not_offered", Status.EOPNOTSUPP)


@pytest.mark.parametrize(
    ("request_", "bit"),
    [
        (rq(Op.FLUSH_DISKCACHE), 1 << Op.FLUSH_DISKCACHE),
        (rq(Op.WRITE_BARRIER), 1 << Op.WRITE_BARRIER),
        (discard(0, 8), 1 << Op.DISCARD),
        (discard(0, 8, flag=1), OFFER_SECURE),
    ],
)
def test_what_the_storage_turns_out_not_to_do_is_withdrawn(request_: AnyRequest, bit: int) -> None:
    """As blkback does it: the first is answered EOPNOTSUPP, and those after it are not tried."""
    storage = Error(MemoryEngine(1 << 20), one_in=1, error=errno.EOPNOTSUPP)
    offered = ALL | 1 << Op.WRITE_BARRIER | OFFER_SECURE
    with QueueWorld(storage, offered=offered) as world, world.running():
        for turn in (1, 2):
            world.send(request_)
            world.port.notify()
            [answer] = world.collect(1)
            assert answer.status == Status.EOPNOTSUPP
            assert storage.failed == 1, turn
        wait_readable(world.queue.alarm_fd)
        assert world.queue.withdrawn == bit
        assert world.queue.failure()[1] == 0


@pytest.mark.parametrize("operation", [Op.READ, Op.WRITE])
def test_reading_and_writing_are_never_withdrawn(operation: Op) -> None:
    storage = Error(MemoryEngine(1 << 20), one_in=1, error=errno.EOPNOTSUPP)
    with QueueWorld(storage) as world, world.running():
        world.send(rq(operation, 0, world.segment(0)))
        world.port.notify()
        [answer] = world.collect(1)
        assert answer.status == Status.EOPNOTSUPP
        assert world.queue.withdrawn == 0


@pytest.mark.parametrize("flag", [0, 1])
def test_the_storage_is_told_which_discards_are_to_erase(flag: int) -> None:
    engine = ByHand(1 << 20)
    with QueueWorld(engine, offered=ALL | OFFER_SECURE) as world:
        world.send(discard(8, 16, flag=flag))
        world.settle()
        [operation] = engine.channel.take()
        asked = (operation.kind, operation.secure, operation.offset, operation.length)
        operation.complete()
        world.settle()
        assert asked == ("discard", bool(flag), 4096, 8192)


def wait_readable(fd: int) -> None:
    assert select.select([fd], [], [], 10)[0] == [fd]


def test_failing_storage_rings_the_alarm_once_until_it_is_asked() -> None:
    with QueueWorld(Error(open_engine("memory:1M"), one_in=1)) as world, world.running():
        world.send(rq(Op.READ, 0, world.segment(0)))
        world.port.notify()
        wait_readable(world.queue.alarm_fd)
        assert world.queue.failure() == (5, 1)
        [answer] = world.collect(1)
        assert answer.status == Status.ERROR


@ABIS
@pytest.mark.parametrize("flag", [0, 1])
def test_the_id_of_a_discard_comes_back(abi: Abi, flag: int) -> None:
    """Linux 8c9ce606: it was not copied for every ABI."""
    with QueueWorld(abi=abi, offered=ALL | OFFER_SECURE) as world:
        [answer] = world.ask(discard(8, 16, flag=flag, id=0xFEDC_BA98_7654_3210))
        assert (answer.id, answer.operation) == (0xFEDC_BA98_7654_3210, Op.DISCARD)


@pytest.mark.parametrize("segments", [0, 1])
def test_a_flush_reaches_the_storage_before_its_data(segments: int) -> None:
    engine = ByHand(1 << 20)
    with QueueWorld(engine) as world:
        world.send(rq(Op.FLUSH_DISKCACHE, 0, *[world.segment(0)] * segments))
        kinds = []
        world.settle()
        while operations := engine.channel.take():
            assert world.responses() == []
            [operation] = operations
            kinds.append(operation.kind)
            operation.complete()
            world.settle()
        assert kinds == ["flush", "write"][: 1 + segments]
        assert [answer.status for answer in world.responses()] == [Status.OKAY]
