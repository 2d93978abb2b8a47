# SPDX-License-Identifier: Apache-2.0
"""What a disk counts, by queue and over its connections."""

import asyncio

import pytest
from rig_backend import RICH, model_disk
from rig_disk import disk_world, run, until

from xvd.frontend.statistics import FrontCounters, Statistics
from xvd.machine.emulated.limits import Limits
from xvd.xenbus.counters import percentile

LARGE = Limits(pages=32768, grefs=16384, tracks=16384, ports=64)


def test_requests_are_counted_by_kind_and_queue() -> None:
    async def work() -> None:
        async with disk_world(serve=False, limits=LARGE) as world:
            async with model_disk(world, max_queues=2) as (disk, _):
                for at in range(4):
                    await disk.write(at * 100_352, bytes(1024))
                    await disk.read(at * 100_352, 512)
                await disk.flush()
                await disk.discard(0, 4096)
                counted = disk.counters()
                assert (counted.rd_req, counted.wr_req) == (4, 4)
                assert (counted.f_req, counted.ds_req) == (1, 1)
                assert (counted.rd_sect, counted.wr_sect) == (4, 8)
                by_queue = disk.statistics().queues
                assert sum(queue.requests for queue in by_queue) == 10
                assert all(queue.requests for queue in by_queue)

    run(work())


def test_every_answer_is_in_one_bucket_of_its_kind() -> None:
    async def work() -> None:
        async with disk_world(serve=False, limits=LARGE) as world:
            async with model_disk(world, max_queues=2) as (disk, _):
                for at in range(5):
                    await disk.write(at * 102_400, bytes(1024))
                await disk.read(0, 1)
                await disk.flush()
                await disk.discard(0, 4096)
                latency = disk.counters().latency
                sums = {kind: sum(counts) for kind, counts in latency.items()}
                assert sums == {"read": 1, "write": 5, "flush": 1, "discard": 1}
                assert {len(counts) for counts in latency.values()} == {40}
                assert percentile(latency["write"], 50) > 1000

    run(work())


def test_figures_outlive_a_connection() -> None:
    async def work() -> None:
        async with disk_world(serve=False, limits=LARGE) as world:
            async with model_disk(world, max_queues=2) as (disk, backend):
                await disk.write(0, bytes(512))
                backend.paused = True
                writing = asyncio.ensure_future(disk.write(512, bytes(512)))
                await until(lambda: len(backend.seen) == 2)
                assert disk.counters().in_flight == 1
                backend.paused = False
                await backend.come_back(RICH)
                await writing
                counted = disk.counters()
                assert (counted.requests, counted.responses, counted.in_flight) == (
                    3,
                    2,
                    0,
                )
                assert sum(disk.counters().latency["write"]) == 2

    run(work())


@pytest.mark.beyond_xen("lasting")
def test_persistent_grants_are_counted_as_hits_and_misses() -> None:
    async def work() -> None:
        async with disk_world(serve=False, limits=LARGE) as world:
            async with model_disk(world, max_queues=1) as (disk, _):
                for _ in range(3):
                    await disk.write(0, bytes(8192))
                counted = disk.counters()
                assert (counted.granted, counted.reused, counted.revoked) == (2, 4, 0)

    run(work())


def test_nothing_is_counted_before_the_first_connection() -> None:
    nothing = Statistics()

    assert nothing.total() == FrontCounters()
    assert set(nothing.figures()["frontend"].values()) == {0}
