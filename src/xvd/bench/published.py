# SPDX-License-Identifier: Apache-2.0
"""The published experiments on blkback and blkfront, done with both ends here."""

import asyncio
import os
from dataclasses import replace

from xvd.backend.settings import Settings as BackendSettings
from xvd.bench import calibrate, guests, model
from xvd.bench.report import Plot, Report, Table
from xvd.bench.ring import COPYING, MAPPING, ONE_QUEUE, PERSISTENT, Setup, case
from xvd.bench.run import Run, cpu, iops, mib, per_operation
from xvd.bench.sample import Case, Rounds, ratio
from xvd.frontend.load import Job
from xvd.frontend.settings import Settings as FrontendSettings

MODES = {"persistent": PERSISTENT, "mapping": MAPPING, "grant copy": COPYING}
HOST_CPUS = 24
"""Of the machine that the published figures are from, as far as they say."""

MAPPED = "null:256M"
"""Storage for mapping: it touches what was mapped, as storage does. What nobody has touched is in
no CPU's TLB, and costs no shootdown when it is unmapped."""

CALIBRATION_S = 0.3
"""How long each of the model's costs is measured."""


def persistent(run: Run) -> Report:
    """Persistent grants against mapping and copying, over the number of guests."""
    counts = (1, 2, 5, 10) if run.scale >= 1 else (1, 2)
    job = Job(operations=run.operations(500_000), seed=run.seed)
    setups = {mode: Setup(back=back, job=job) for mode, back in MODES.items()}
    slow = replace(job, operations=run.operations(30_000))
    setups["mapping"] = replace(setups["mapping"], engine=MAPPED, job=slow)
    cases = [_guests(f"{mode} {n}", setups[mode], n) for n in counts for mode in MODES]
    rounds = run.measure(cases)
    costs = calibrate.costs(
        job,
        seconds=CALIBRATION_S * min(1.0, run.scale * 10),
        lasting=Setup().engine,
        passing=MAPPED,
    )
    columns = ("guests", "mode", "IOPS", "mapped/op", "shootdowns/op", "backend ns/op")
    rows = [
        (
            str(n), mode, iops(rounds[f"{mode} {n}"]),
            per_operation(rounds[f"{mode} {n}"], "back_mapped"),
            per_operation(rounds[f"{mode} {n}"], "shootdowns"), cpu(rounds[f"{mode} {n}"], "back"),
        )
        for n in counts
        for mode in MODES
    ]  # fmt: skip
    lines = {mode: [(n, iops(rounds[f"{mode} {n}"])) for n in counts] for mode in MODES}
    return Report(
        "persistent",
        "Persistent grants, over the number of guests",
        "Null storage, 4 KiB random reads, depth 32, one queue and one page of ring each; every "
        "guest is a process, the backend is one process with a thread for each disk. With mapping "
        "the storage fills what is read with zeros, so that the pages are touched. The model knows "
        "the costs below, each measured by itself, and none of the measured points.",
        [Table(columns, rows), _predicted(rounds, costs), calibrate.table(costs)],
        Plot("guests", "IOPS, all guests", lines),
        published="650,000 IOPS at 5 guests, and 400,000 still at 10 where the grants are not "
        "persistent and everything falls behind (Linux 0a8704a5, on a 24-CPU host with a ramdisk).",
        ratios={
            f"persistent against mapping, {n} guests": ratio(
                rounds, f"persistent {n}", f"mapping {n}"
            )
            for n in counts
        },
    )


def _guests(name: str, setup: Setup, count: int) -> Case:
    return Case(name, lambda: asyncio.run(guests.measure(setup, count)))


def _predicted(rounds: Rounds, costs: model.Costs) -> Table:
    """Return what the model says of every measured point, and of a larger host."""
    lasting = replace(costs, mapping=0.0, shared=0.0)
    rows: list[tuple[str | float, ...]] = []
    for mode, of_mode in (("persistent", lasting), ("mapping", costs)):
        for count in (1, 2, 5, 10, 20):
            measured = iops(rounds[name]) if (name := f"{mode} {count}") in rounds else None
            rows.append((str(count), mode, *_compared(measured, of_mode, count)))
    return Table(("guests", "mode", *_COMPARED), rows)


HERE = os.cpu_count() or 1
_COMPARED = ("measured", f"model, {HERE} CPUs", "of measured", f"model, {HOST_CPUS} CPUs")


def _compared(measured: float | None, costs: model.Costs, count: int) -> tuple[str | float, ...]:
    """The cells under `_COMPARED`."""
    here, there = (model.predict(costs, guests=count, cpus=cpus) for cpus in (HERE, HOST_CPUS))
    return measured or "-", here, here / measured if measured else "-", there


def indirect(run: Run) -> Report:
    """Segments of a request, at large sequential reads."""
    segments = (11, 32, 64, 128, 256)
    job = Job(
        size=1 << 20, depth=8, sequential=True, operations=run.operations(4000), seed=run.seed
    )
    rounds = run.measure(
        [
            case(
                str(n),
                Setup("memory:256M", job=job, filled=True,
                      front=replace(ONE_QUEUE, max_indirect_segments=n)),
            )
            for n in segments
        ]
    )  # fmt: skip
    rows = [
        (
            str(n), mib(rounds[str(n)]), per_operation(rounds[str(n)], "front_requests"),
            per_operation(rounds[str(n)], "back_notified"), cpu(rounds[str(n)], "front") / 1000,
            cpu(rounds[str(n)], "back") / 1000,
        )
        for n in segments
    ]  # fmt: skip
    columns = ("segments", "MiB/s", "requests/op", "responses' events/op", "front us/op",
               "back us/op")  # fmt: skip
    return Report(
        "indirect",
        "Indirect descriptors: segments of a request",
        "Memory storage, sequential reads of 1 MiB, depth 8, one queue, one page of ring.",
        [Table(columns, rows)],
        Plot("segments", "MiB/s", {"1 MiB reads": [(n, mib(rounds[str(n)])) for n in segments]}),
        published="About as fast at 32 segments as with more on most storage, and much faster than "
        "11 on SSDs that need large requests (Linux 402b27f9 and its measurements).",
        ratios={"256 segments against 11": ratio(rounds, "256", "11")},
    )


def ring_pages(run: Run) -> Report:
    """Pages of the ring, on storage with latency."""
    orders = range(7)
    jobs = [Job(depth=32 << n, operations=run.operations(8000) << n, seed=run.seed) for n in orders]
    rounds = run.measure(
        [
            case(
                str(1 << n),
                Setup(
                    "null:256M",
                    ("delay:read=5ms,write=5ms",),
                    back=BackendSettings(max_ring_page_order=6, max_persistent_grants=4096),
                    front=replace(ONE_QUEUE, max_ring_page_order=n, pool_pages=4096),
                    job=jobs[n],
                ),
            )
            for n in orders
        ]
    )
    names = [str(1 << n) for n in orders]
    rows = [
        (name, str(32 * int(name)), iops(rounds[name]), ratio(rounds, name, "1"),
         cpu(rounds[name], "back"))
        for name in names
    ]  # fmt: skip
    return Report(
        "ring-pages",
        "Pages of the ring, on storage with latency",
        "Null storage that answers 5 ms after it was asked, however much it was asked; 4 KiB "
        "random reads, as deep as the ring, one queue, persistent grants.",
        [Table(("pages", "depth", "IOPS", "against one page", "backend ns/op"), rows)],
        Plot("pages", "IOPS", {"5 ms": [(int(name), iops(rounds[name])) for name in names]}, True),
        published="Up to 15 times with 64 pages, on storage of many spindles behind a network "
        "(the patches before Linux 86839c56).",
        ratios={"64 pages against 1": ratio(rounds, "64", "1")},
    )


def queues(run: Run) -> Report:
    """Queues of a disk."""
    counts = (1, 2, 4, 8)
    setups = {
        n: Setup(
            back=BackendSettings(max_queues=n),
            front=FrontendSettings(max_queues=n),
            job=Job(depth=32 * n, operations=run.operations(400_000), seed=run.seed),
        )
        for n in counts
    }
    rounds = run.measure([case(str(n), setup) for n, setup in setups.items()])
    costs = calibrate.costs(
        setups[1].job, seconds=CALIBRATION_S * min(1.0, run.scale * 10), lasting=setups[1].engine
    )
    rows = [
        (
            str(n), cpu(rounds[str(n)], "front"), cpu(rounds[str(n)], "back"),
            *_compared(iops(rounds[str(n)]), costs, n),
        )
        for n in counts
    ]  # fmt: skip
    columns = ("queues", "front ns/op", "back ns/op", *_COMPARED)
    both = {n: cpu(rounds[str(n)], "front") + cpu(rounds[str(n)], "back") for n in counts}
    return Report(
        "queues",
        "Queues of a disk",
        "Null storage, 4 KiB random reads, depth 32 for each queue, persistent grants. A queue of "
        "the model is a guest of its own with one queue: they share nothing but the CPUs.",
        [Table(columns, rows), calibrate.table(costs)],
        Plot("queues", "IOPS", {
            name: [(int(row[0]), float(row[columns.index(name)])) for row in rows]
            for name in ("measured", f"model, {HERE} CPUs", f"model, {HOST_CPUS} CPUs")
        }),
        published="810,000 to 1,410,000 IOPS for 4 queues, 780,000 to 1,354,000 for 8 "
        "(random read and write, null_blk, the patches before Linux d62d8600).",
        ratios={"CPU of an operation, 4 queues against 1": both[4] / both[1]},
    )  # fmt: skip


def guest_pages(run: Run) -> Report:
    """The guest's page size, with indirect descriptors and without."""
    sizes = (4096, 16384, 65536)
    job = Job(size=65536, depth=8, operations=run.operations(20_000), seed=run.seed)
    setups = {
        f"{size >> 10}K, {segments} segments": Setup(
            "memory:256M", job=job, filled=True,
            front=replace(ONE_QUEUE, page_size=size, max_indirect_segments=segments),
        )
        for size in sizes
        for segments in (11, 32)
    }  # fmt: skip
    rounds = run.measure([case(name, setup) for name, setup in setups.items()])
    rows = [
        (name, mib(found), per_operation(found, "front_requests"), cpu(found, "front"),
         cpu(found, "back"))
        for name, found in rounds.items()
    ]  # fmt: skip
    columns = ("guest's page", "MiB/s", "requests/op", "front ns/op", "back ns/op")
    bars = {
        f"{n} segments": [(f"{s >> 10}K", mib(rounds[f"{s >> 10}K, {n} segments"])) for s in sizes]
        for n in (11, 32)
    }
    return Report(
        "guest-pages",
        "The guest's page size",
        "Memory storage, random reads of 64 KiB, depth 8, one queue. With 11 segments a page of "
        "64 KiB is two requests on the ring.",
        [Table(columns, rows)],
        Plot("guest's page", "MiB/s", bars),
        published="None in figures: the split was made so that a 64 KiB guest works at all with a "
        "backend without indirect descriptors (Linux 6cc56833).",
        ratios={
            "64K against 4K, 32 segments": ratio(rounds, "64K, 32 segments", "4K, 32 segments")
        },
    )
