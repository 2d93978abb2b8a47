# SPDX-License-Identifier: Apache-2.0
"""Limits of a queue, and of several queues together: rates, bursts, and even parts.

The clock goes from one moment at which something is due to the next, so that seconds take no time.
"""

from collections.abc import Callable
from itertools import count

import pytest
from rig_queue import WORKED, QueueWorld, rq

from xvd.backend.iotune import IoTune
from xvd.blkif.abi import Op, Status
from xvd.blkif.messages import AnyRequest, IndirectRequest
from xvd.dataplane.back.throttle import Throttle
from xvd.types import PAGE_SIZE

SECOND = 10**9
BEGIN = 1000 * SECOND
DEPTH = 8
Asked = Callable[[QueueWorld, int], AnyRequest]


def throttle(now: int = BEGIN, **limits: int) -> Throttle:
    made = Throttle()
    configure(made, now, **limits)
    return made


def configure(made: Throttle, now: int, **limits: int) -> None:
    tune = IoTune(**limits)  # type: ignore[arg-type]  all of these are numbers
    made.configure(tune.buckets, request_bytes=tune.size_iops_sec, now_ns=now)


def asking(op: Op, pages: int = 1) -> Asked:
    """Ask for the first pages of the disk."""
    return lambda world, id: rq(op, 0, *(world.segment(page) for page in range(pages)), id=id)


READ, WRITE = asking(Op.READ), asking(Op.WRITE)


class Guest:
    """One that always has `DEPTH` requests on the ring."""

    def __init__(self, world: QueueWorld, asked: Asked) -> None:
        self.world = world
        self.answered = 0
        self._asked = asked
        self._ids = count(1)
        self.ask(DEPTH)

    def ask(self, requests: int) -> None:
        self.world.send(*(self._asked(self.world, next(self._ids)) for _ in range(requests)))

    def step(self, now: int) -> None:
        """Let the queue do what it does at a moment."""
        self.world.queue.set_time(now)
        while self.world.queue.step() & WORKED:
            answers = self.world.responses()
            assert {answer.status for answer in answers} <= {Status.OKAY}
            self.answered += len(answers)
            self.ask(len(answers))

    @property
    def due(self) -> int:
        """When its queue goes on."""
        assert self.world.queue.may_sleep()
        return self.world.queue.due_ns


def serve(guests: list[Guest], since: int, until: int) -> list[int]:
    """Serve from one moment to another; how many requests of each guest were answered."""
    before = [guest.answered for guest in guests]
    now = since
    while now < until:
        for guest in guests:
            guest.step(now)
        now = min(guest.due for guest in guests)
    return [guest.answered - was for guest, was in zip(guests, before, strict=True)]


@pytest.mark.parametrize(
    ("limits", "asked", "a_second"),
    [
        ({"total_iops_sec": 200}, READ, 200),
        ({"total_iops_sec": 200}, WRITE, 200),
        ({"read_iops_sec": 300, "write_iops_sec": 10}, READ, 300),
        ({"write_iops_sec": 300, "read_iops_sec": 10}, WRITE, 300),
        ({"write_iops_sec": 300}, asking(Op.FLUSH_DISKCACHE, 0), 300),
        ({"total_bytes_sec": 200 * PAGE_SIZE}, READ, 200),
        ({"read_bytes_sec": 300 * PAGE_SIZE, "write_bytes_sec": 1}, READ, 300),
        ({"write_bytes_sec": 300 * PAGE_SIZE, "read_bytes_sec": 1}, WRITE, 300),
        ({"total_iops_sec": 1000, "total_bytes_sec": 400 * PAGE_SIZE}, asking(Op.READ, 2), 200),
        ({"total_iops_sec": 400, "size_iops_sec": PAGE_SIZE}, asking(Op.READ, 2), 200),
        ({"total_iops_sec": 3}, READ, 3),
    ],
)
def test_a_rate_is_kept_within_three_hundredths(
    limits: dict[str, int], asked: Asked, a_second: int
) -> None:
    with QueueWorld() as world:
        world.queue.set_throttles(throttle(**limits), None)

        [answered] = serve([Guest(world, asked)], BEGIN, BEGIN + 4 * SECOND)

    assert answered == pytest.approx(4 * a_second, rel=0.03, abs=1)


@pytest.mark.parametrize(("last", "bytes_each"), [(7, 16 * PAGE_SIZE), (0, 16 * 512)])
def test_an_indirect_request_counts_by_what_its_segments_are(last: int, bytes_each: int) -> None:
    def indirect(world: QueueWorld, id: int) -> IndirectRequest:
        segments = [world.segment(page, 0, last) for page in range(16)]
        return world.indirect(Op.WRITE, 0, segments, id=id)

    with QueueWorld(indirect_max=32) as world:
        world.queue.set_throttles(throttle(write_bytes_sec=100 * bytes_each), None)

        [answered] = serve([Guest(world, indirect)], BEGIN, BEGIN + 4 * SECOND)

    assert answered == pytest.approx(4 * 100, rel=0.03)


def test_what_is_not_limited_does_not_wait() -> None:
    with QueueWorld() as world:
        world.queue.set_throttles(throttle(write_iops_sec=1), None)
        world.queue.set_time(BEGIN)

        answers = world.ask(*(READ(world, id) for id in range(1, 31)))

        assert (len(answers), world.queue.counters()["throttled"]) == (30, 0)


def test_a_burst_has_its_own_rate_for_its_length_and_then_has_to_be_saved_up() -> None:
    limits = {"total_iops_sec": 100, "total_iops_sec_max": 500, "total_iops_sec_max_length": 2}
    with QueueWorld() as world:
        world.queue.set_throttles(throttle(**limits), None)
        guest = Guest(world, READ)

        seconds = [serve([guest], BEGIN + n * SECOND, BEGIN + (n + 1) * SECOND) for n in range(4)]

    assert [answered for [answered] in seconds] == [
        pytest.approx(500, rel=0.06), pytest.approx(500, rel=0.06),
        pytest.approx(100, rel=0.06), pytest.approx(100, rel=0.06),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("limits", "shares"),
    [
        ({"total_iops_sec": 300}, [100, 100, 100]),
        ({"total_bytes_sec": 300 * PAGE_SIZE}, [100, 100, 20]),
    ],
    ids=["requests", "bytes"],
)
def test_the_disks_of_a_group_have_even_parts(limits: dict[str, int], shares: list[int]) -> None:
    group = throttle(**limits)
    with QueueWorld() as one, QueueWorld() as two, QueueWorld() as three:
        guests = [Guest(one, READ), Guest(two, WRITE), Guest(three, asking(Op.READ, 5))]
        for world in (one, two, three):
            world.queue.set_throttles(None, group)

        answered = serve(guests, BEGIN, BEGIN + 4 * SECOND)

    assert answered == [pytest.approx(4 * share, rel=0.1) for share in shares]


def test_a_disk_in_a_group_keeps_its_own_limit_and_leaves_the_rest_to_others() -> None:
    group = throttle(total_iops_sec=300)
    with QueueWorld() as one, QueueWorld() as two:
        one.queue.set_throttles(throttle(total_iops_sec=50), group)
        two.queue.set_throttles(None, group)

        answered = serve([Guest(one, READ), Guest(two, READ)], BEGIN, BEGIN + 4 * SECOND)

    assert answered == [pytest.approx(200, rel=0.03), pytest.approx(1000, rel=0.03)]


def test_a_request_of_more_than_a_second_s_bytes_waits_and_is_served() -> None:
    with QueueWorld() as world:
        world.queue.set_throttles(throttle(total_bytes_sec=PAGE_SIZE), None)

        [answered] = serve([Guest(world, asking(Op.READ, 8))], BEGIN, BEGIN + 80 * SECOND)

    assert answered == pytest.approx(10, abs=1)


def test_what_waits_is_on_the_ring_and_holds_nothing() -> None:
    with QueueWorld(persistent=None) as world:
        world.queue.set_throttles(throttle(total_iops_sec=1), None)
        guest = Guest(world, READ)
        guest.step(BEGIN)

        counters = world.queue.counters()

        assert (guest.answered, counters["requests"]) == (1, 1)
        assert counters["mapped"] <= 1  # real Xen has it copied
        assert (world.queue.in_flight, counters["throttled"]) == (0, 1)


def test_other_limits_hold_at_once_whatever_was_waited_for() -> None:
    limits = throttle(total_iops_sec=1)
    with QueueWorld() as world:
        world.queue.set_throttles(limits, None)
        guest = Guest(world, READ)
        guest.step(BEGIN)
        configure(limits, BEGIN, total_iops_sec=1000)
        world.queue.set_throttles(limits, None)

        [answered] = serve([guest], BEGIN, BEGIN + SECOND)

    assert answered == pytest.approx(1000, rel=0.03)


def test_limits_that_change_all_the_time_let_no_more_through() -> None:
    limits = throttle(total_iops_sec=100)
    with QueueWorld() as world:
        world.queue.set_throttles(limits, None)
        guest, now = Guest(world, READ), BEGIN
        for n in range(100):
            configure(limits, now, total_iops_sec=100 + n % 2)
            world.queue.set_throttles(limits, None)
            guest.step(now)
            now += SECOND // 100

    assert guest.answered < 220


def test_a_disk_whose_limits_are_gone_goes_on_at_once() -> None:
    with QueueWorld() as world:
        world.queue.set_throttles(throttle(total_iops_sec=1), throttle(total_iops_sec=1))
        world.send(*(READ(world, id) for id in range(1, 21)))
        world.queue.set_time(BEGIN)
        world.queue.step()

        world.queue.set_throttles(None, None)
        world.queue.step()
        world.queue.step()

        assert (len(world.responses()), world.queue.may_sleep()) == (20, True)
        assert world.queue.due_ns == 0
