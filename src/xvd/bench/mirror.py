# SPDX-License-Identifier: Apache-2.0
"""What it costs a guest that its disk is copied while it is used."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from xvd.backend.copies import Copies, Phase
from xvd.bench.limit import IMAGE_SIZE
from xvd.bench.report import Cell, Plot, Report, Table
from xvd.bench.ring import ONE_QUEUE, Guest, Setup, filling, guest, sample_of
from xvd.bench.run import Run, iops
from xvd.bench.sample import Case, Sample, WrongData, ratio
from xvd.frontend.load import Job, run_load

_LOOK_S: Final = 0.001
_PLAIN: Final = "no copy"

METHOD: Final = """An image of {size} MiB on a file system, written to in all of it; random writes
of 4 KiB, one queue, depth 32. Changes are noted after a backup with a name. A mirror that is the
same gets each write as well as the disk; one that is being made is begun again whenever it is the
same, for as long as the load lasts. The copy itself is timed without a load, and the move to the
mirror under it."""


def mirror(run: Run) -> Report:
    """Measure a guest's writes beside what is copied of its disk."""
    size = max(run.operations(IMAGE_SIZE >> 12) << 12, 4 << 20)
    job = Job(operations=run.operations(100_000), seed=run.seed, write_percent=100, span=size)
    kinds = {_PLAIN: _alone, "changes are noted": _noted, "a mirror that is the same": _same,
             "a mirror that is being made": _made}  # fmt: skip
    cases = [Case(name, lambda kind=kind: asyncio.run(kind(run.disk, job)))  # type: ignore[misc]
             for name, kind in kinds.items()]  # fmt: skip
    rounds = run.measure(cases)
    rows: list[tuple[Cell, ...]] = [
        (name, iops(samples), ratio(rounds, name, _PLAIN)) for name, samples in rounds.items()
    ]
    copies = rounds["a mirror that is the same"]
    rate = sorted(one.counts["copy_mib_s"] for one in copies)[len(copies) // 2]
    moves = sorted(one.counts["move_ms"] for one in copies)
    return Report(
        "mirror",
        "A disk that is copied while it is used",
        METHOD.format(size=size >> 20).replace("\n", " "),
        [
            Table(("random writes", "IOPS", "of no copy"), rows),
            Table(
                ("the copy", "median", "longest"),
                [("MiB a second, without a load", rate, ""),
                 ("the move to the mirror under load, ms", moves[len(moves) // 2], moves[-1])],
            ),
        ],
        Plot("", "IOPS", {"xvd": [(name, iops(samples)) for name, samples in rounds.items()]}),
        ratios={f"{row[0]}, against no copy": float(row[2]) for row in rows[1:]},
    )  # fmt: skip


@contextlib.asynccontextmanager
async def _disk(place: Path, job: Job) -> AsyncIterator[tuple[Guest, Copies, str]]:
    """A guest's disk that is full, its copies, and a place for one."""
    image = place / f"xvd-bench-mirror-{os.getpid()}.img"
    target = image.with_suffix(".copy")
    try:
        image.touch()
        os.truncate(image, job.span)
        async with guest(Setup(str(image), job=job)) as disk:
            await run_load(disk.machine, disk.store, disk.path, filling(job), settings=ONE_QUEUE)
            [device] = disk.server.devices.values()
            yield disk, device.copies, str(target)
    finally:
        for path in (image, target):
            path.unlink(missing_ok=True)


async def _load(disk: Guest, job: Job) -> Sample:
    return sample_of(
        job, await run_load(disk.machine, disk.store, disk.path, job, settings=ONE_QUEUE), 0.0, {}
    )


async def _until(copies: Copies, phase: Phase) -> None:
    while copies.job is not None and copies.job.phase is not phase:
        if copies.job.phase is Phase.FAILED:
            raise WrongData(f"the copy has failed: {copies.job.why}")
        await asyncio.sleep(_LOOK_S)


async def _alone(place: Path, job: Job) -> Sample:
    async with _disk(place, job) as (disk, _, _):
        return await _load(disk, job)


async def _noted(place: Path, job: Job) -> Sample:
    async with _disk(place, job) as (disk, copies, target):
        await copies.backup(target, "bench")
        await _until(copies, Phase.DONE)
        return await _load(disk, job)


async def _same(place: Path, job: Job) -> Sample:
    async with _disk(place, job) as (disk, copies, target):
        began = time.monotonic()
        await copies.mirror(target)
        await _until(copies, Phase.READY)
        rate = job.span / (time.monotonic() - began) / (1 << 20)
        sample = await _load(disk, job)
        under_load = asyncio.ensure_future(_load(disk, job))
        await asyncio.wait([under_load], timeout=sample.seconds / 2)
        began = time.monotonic()
        await copies.pivot()
        moved = time.monotonic() - began
        if (await under_load).errors:
            raise WrongData("operations failed when the disk moved to its mirror")
        return replace(sample, counts={"copy_mib_s": rate, "move_ms": moved * 1000})


async def _made(place: Path, job: Job) -> Sample:
    async with _disk(place, job) as (disk, copies, target):
        loading = asyncio.ensure_future(_load(disk, job))
        while not loading.done():
            await copies.mirror(target)
            await _until(copies, Phase.READY)
            await copies.cancel()
        return await loading
