# SPDX-License-Identifier: Apache-2.0
"""What a process for each guest costs, beside one process for all of them."""

import asyncio
import contextlib
import resource
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from xvd.bench import guests
from xvd.bench.daemons import Daemons, daemons
from xvd.bench.disks import SETTINGS
from xvd.bench.peers import fio_nbd, missing
from xvd.bench.report import Cell, Plot, Report, Table
from xvd.bench.ring import Setup
from xvd.bench.run import Run, cpu, iops
from xvd.bench.sample import Case, Sample, ratio
from xvd.frontend.disk import Disk
from xvd.frontend.load import Job
from xvd.machine.emulated.service import connect
from xvd.types import Domid

MODES: Final = ("shared", "guest")
SIZE: Final = 256 << 20
IDLE_S: Final = 10.0
FEW_MAPPINGS: Final = ("--set", "max_persistent_grants=64")
"""For each disk: a process may have 65,530 (vm.max_map_count), room for 92 disks as they come."""
SETTLE_S: Final = 3.0
"""What connecting has left to do."""


@dataclass(frozen=True, slots=True)
class _Load:
    """storage: a URI, or an image's name. guests: how many do the job, each on a disk. nbd_s: for
    so many seconds fio does it by the guest's NBD export."""

    name: str
    storage: str
    guests: int
    job: Job
    nbd_s: float = 0.0


def isolation(run: Run) -> Report:
    """Load by one guest and by two, and many guests that do nothing, in either mode."""
    job = Job(operations=run.operations(300_000), seed=run.seed)
    alone = replace(job, depth=1)
    loads = [
        _Load("memory, read", "memory:256M", 1, job),
        _Load("memory, write", "memory:256M", 1, replace(job, write_percent=100)),
        _Load("memory, read, depth 1", "memory:256M", 1, alone),
        _Load("file, read", "disk.img", 1, job),
        _Load("memory, read, two guests", "memory:256M", 2, job),
    ]
    if not missing("fio"):
        loads.append(_Load("memory, read, by NBD", "memory:256M", 1, job, run.seconds(3)))
    rounds = run.measure([_case(load, mode, run.directory) for load in loads for mode in MODES])
    rows: list[tuple[Cell, ...]] = []
    ratios = {}
    for load in loads:
        shared, own = (f"{load.name}: {mode}" for mode in MODES)
        ratios[f"{load.name}, of one process for all"] = against = ratio(rounds, own, shared)
        rows.append(
            (
                load.name, iops(rounds[shared]), iops(rounds[own]), against,
                cpu(rounds[shared], "back"), cpu(rounds[own], "back"),
            )
        )  # fmt: skip
    columns = ("4 KiB, random", "shared, IOPS", "guest, IOPS", "guest / shared",
               "shared, back ns/op", "guest, back ns/op")  # fmt: skip
    idle, lines = _idle(run)
    return Report(
        "isolation",
        "A process for each guest",
        "`--isolation shared` beside `--isolation guest`, with its fence: a backend started by its "
        "command, each guest a process, depth 32 unless said. Then guests with a disk each, "
        "connected, that do nothing, with 64 persistent grants at most: memory counts once what "
        "processes share.",
        [Table(columns, rows), idle],
        Plot("idle guests", "memory, MiB", lines, log=True),
        ratios=ratios,
    )


def _case(load: _Load, mode: str, place: Path) -> Case:
    measure = _measure_nbd if load.nbd_s else _measure
    return Case(f"{load.name}: {mode}", lambda: asyncio.run(measure(load, mode, place)))


async def _measure_nbd(load: _Load, mode: str, place: Path) -> Sample:
    with daemons("--isolation", mode, place=place) as backend:
        await backend.attach(Domid(1), load.storage)
        before = backend.cpu_s()
        fio = fio_nbd("", "xvd nbd", backend.host, load.job, load.nbd_s)
        found = await asyncio.to_thread(fio.measure)
        return replace(found, back_ns=(backend.cpu_s() - before) / found.operations * 1e9)


async def _measure(load: _Load, mode: str, place: Path) -> Sample:
    with daemons("--isolation", mode, place=place) as backend:
        target: object = load.storage
        if ":" not in load.storage:
            target = backend.image(load.storage, SIZE)
        paths = [await backend.attach(Domid(n), target) for n in range(1, load.guests + 1)]
        children = await guests.start(str(backend.host), paths, Setup(job=load.job))
        # A process ends with its guest's disk, and its time with it.
        before, results = backend.cpu_s(), asyncio.ensure_future(guests.go(children))
        spent = 0.0
        while not results.done():
            with contextlib.suppress(OSError):
                spent = max(spent, backend.cpu_s() - before)
            await asyncio.wait([results], timeout=0.02)
        return guests.together(load.job, await results, spent, {})


def _idle(run: Run) -> tuple[Table, dict[str, Sequence[tuple[Cell, float]]]]:
    """Memory and CPU of so many guests that do nothing."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    rows: list[tuple[Cell, ...]] = []
    lines: dict[str, list[tuple[Cell, float]]] = {mode: [] for mode in MODES}
    for count in (1, 20, max(2, round(200 * min(run.scale, 1)))):
        row: list[Cell] = [str(count)]
        for mode in MODES:
            memory, spent = asyncio.run(_rest(mode, count, run.directory, IDLE_S * run.scale))
            run.tick(f"{count} guests: {mode}")
            lines[mode].append((str(count), memory / (1 << 20)))
            row += [memory / (1 << 20), spent * 1e3]
        rows.append(tuple(row))
    columns = ("idle guests", "shared, MiB", "shared, CPU ms/s", "guest, MiB", "guest, CPU ms/s")
    return Table(columns, rows), dict(lines)


async def _rest(mode: str, count: int, place: Path, seconds: float) -> tuple[int, float]:
    """Bytes of memory, and CPU seconds of a second."""
    with daemons("--isolation", mode, *FEW_MAPPINGS, place=place) as backend:
        async with contextlib.AsyncExitStack() as stack:
            for domid in map(Domid, range(1, count + 1)):
                await _connect(backend, domid, stack)
            await asyncio.sleep(SETTLE_S)
            before = backend.cpu_s()
            await asyncio.sleep(seconds)
            return backend.memory(), (backend.cpu_s() - before) / seconds


async def _connect(backend: Daemons, domid: Domid, stack: contextlib.AsyncExitStack) -> None:
    """Give a guest a disk, and have it in use here until the stack is unwound."""
    path = await backend.attach(domid, backend.image(f"{domid}.img", 16 << 20))
    machine = connect(backend.host, domid)
    stack.callback(machine.close)
    store = await stack.enter_async_context(await machine.xenstore())
    disk = await Disk.open(machine, store, path, settings=SETTINGS)
    await stack.enter_async_context(disk)
    await disk.write(0, bytes(4096))
