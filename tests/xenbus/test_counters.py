# SPDX-License-Identifier: Apache-2.0
"""Counters have one name each, and are added by it."""

import pytest
from rig_disk import disk_world, run

from xvd.backend.counters import BackCounters
from xvd.frontend.statistics import FrontCounters, Statistics
from xvd.xenbus.counters import LoopCounters, percentile, total


def test_counters_are_added_by_name_and_refusals_by_reason() -> None:
    first = BackCounters(requests=3, refusals={"read_only": 1}, latency={"read": [1, 0]})
    second = BackCounters(
        requests=4, errors=1, refusals={"read_only": 1, "bad_grant": 2}, latency={"read": [2, 3]}
    )

    assert total(BackCounters, (first, second)) == BackCounters(
        requests=7, errors=1, refusals={"read_only": 2, "bad_grant": 2}, latency={"read": [3, 3]}
    )
    assert first.refusals == {"read_only": 1}


def test_what_is_of_the_moment_is_zero_when_it_is_over() -> None:
    back = BackCounters(requests=2, in_flight=2, persistent_grants=3, buffer_pages=4)
    front = FrontCounters(requests=2, in_flight=1, placed=4)

    assert back.over() == BackCounters(requests=2)
    assert front.over() == FrontCounters(requests=2)


def test_queues_are_added_one_by_one_over_connections() -> None:
    before = Statistics([FrontCounters(requests=1), FrontCounters(requests=2)])

    after = before.plus(Statistics([FrontCounters(requests=4)]))

    assert [one.requests for one in after.queues] == [5, 2]
    assert after.total().requests == 7


def test_what_another_version_counts_is_left_out() -> None:
    counters = BackCounters.of({"requests": 1, "of_tomorrow": 2})

    assert counters == BackCounters(requests=1)
    assert not hasattr(counters, "of_tomorrow")


def test_every_figure_of_a_queue_is_one_of_the_type() -> None:
    async def work() -> None:
        async with disk_world() as world, await world.disk() as disk:
            await disk.read(0, 512)
            assert world.server is not None
            (device,) = world.server.devices.values()
            connection = device.disk.connection
            assert connection is not None
            (link, *_) = connection.links
            assert set(link.queue.counters()) == set(BackCounters.names())
            assert link.runner is not None
            assert set(link.runner.counters()) == set(LoopCounters.names())
            (queue, *_) = disk._connection.queues
            assert {*queue.counters(), "latency"} == set(FrontCounters.names())

    run(work())


@pytest.mark.parametrize(
    ("counts", "percent", "wanted"),
    [([], 50, 0), ([0, 0], 50, 0), ([1], 50, 2), ([0, 99, 1], 99, 4), ([0, 99, 1], 100, 8)],
)
def test_percentiles_are_the_upper_bounds_of_buckets(
    counts: list[int], percent: float, wanted: int
) -> None:
    assert percentile(counts, percent) == wanted
