# SPDX-License-Identifier: Apache-2.0
"""What must not grow: the cost of a request with the ring, and memory under pressure."""

import asyncio
import time
from dataclasses import replace

from xvd.backend.server import Server
from xvd.backend.settings import Settings as BackendSettings
from xvd.bench.report import Plot, Report, Table
from xvd.bench.ring import COPYING, ONE_QUEUE, Guest, Setup, case, measure
from xvd.bench.run import Run, cpu, iops
from xvd.bench.sample import Case, Sample, median, ratio
from xvd.frontend.load import Job


def scale(run: Run) -> Report:
    """The cost of a request over the ring's pages."""
    orders = range(7)
    job = Job(operations=run.operations(300_000), seed=run.seed)
    rounds = run.measure(
        [
            case(
                str(1 << n),
                Setup(
                    back=BackendSettings(max_ring_page_order=6),
                    front=replace(ONE_QUEUE, max_ring_page_order=n),
                    job=job,
                ),
            )
            for n in orders
        ]
    )
    names = [str(1 << n) for n in orders]
    rows = [
        (name, iops(rounds[name]), cpu(rounds[name], "front"), cpu(rounds[name], "back"),
         ratio(rounds, name, "1", _cost))
        for name in names
    ]  # fmt: skip
    return Report(
        "scale",
        "What must not grow with the ring",
        "Null storage, 4 KiB random reads, depth 32, one queue.",
        [Table(("ring pages", "IOPS", "front ns/op", "back ns/op", "cost against one"), rows)],
        Plot("ring pages", "CPU ns of an operation, both ends",
             {"4 KiB": [(int(name), median(rounds[name], _cost)) for name in names]}, True),
        ratios={
            "cost of an operation, 64 ring pages against 1": ratio(rounds, "64", "1", _cost),
        },
    )  # fmt: skip


def _cost(sample: Sample) -> float:
    return (sample.front_ns or 0) + (sample.back_ns or 0)


def pressure(run: Run) -> Report:
    """Pages kept for copying, under load and after it, with memory pressure and without."""
    job = Job(size=256 << 10, depth=32, operations=run.operations(20_000), seed=run.seed)
    setup = Setup(
        back=replace(COPYING, max_buffer_pages=8192),
        front=replace(ONE_QUEUE, max_indirect_segments=64, pool_pages=4096),
        job=job,
    )
    cases = [
        Case("left alone", lambda: asyncio.run(measure(setup))),
        Case("squeezed", lambda: asyncio.run(_squeezed(setup))),
    ]
    rounds = run.measure(cases)
    rows = [
        (
            name, iops(samples), median(samples, lambda s: s.counts["back_buffer_pages"]),
            median(samples, lambda s: s.counts["back_buffer_pages_released"]),
            cpu(samples, "back") / 1000,
        )
        for name, samples in rounds.items()
    ]  # fmt: skip
    columns = ("memory", "IOPS", "pages kept at the end", "pages given back", "backend us/op")
    return Report(
        "pressure",
        "Memory pressure: pages kept for copying",
        "Null storage, grant copy, random reads of 256 KiB, depth 32; memory pressure is reported "
        "every 100 ms, each time for 10 ms (buffer_squeeze_duration_ms), as Linux would.",
        [Table(columns, rows)],
        Plot("", "pages kept at the end",
             {"": [(name, median(samples, lambda s: s.counts["back_buffer_pages"]))
                   for name, samples in rounds.items()]}),
        published="76,672 swap-ins become 867, with no loss of speed (Linux cb9369bd: a backend "
        "domain that ran out of memory with its pages kept, and with them squeezed).",
        ratios={"speed under pressure": ratio(rounds, "squeezed", "left alone")},
    )  # fmt: skip


async def _squeezed(setup: Setup) -> Sample:
    squeezing: list[asyncio.Task[None]] = []

    async def squeeze(server: Server) -> None:
        while True:
            await asyncio.sleep(0.1)
            server.squeeze()

    def began(guest: Guest) -> None:
        squeezing.append(asyncio.create_task(squeeze(guest.server)))

    def ended(guest: Guest) -> None:
        guest.server.squeeze()
        time.sleep(0.1)  # for the queue's own thread, which gives them back

    sample = await measure(setup, at_begin=began, at_end=ended)
    for task in squeezing:
        task.cancel()
    return sample
