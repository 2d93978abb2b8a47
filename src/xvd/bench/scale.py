# SPDX-License-Identifier: Apache-2.0
"""What must not grow: the cost of a request with the ring, of a disk with the disks."""

import asyncio
import contextlib
import resource
import threading
import time
from dataclasses import replace
from pathlib import Path

from xvd.backend.server import Server
from xvd.backend.settings import Settings as BackendSettings
from xvd.bench.report import Plot, Report, Table
from xvd.bench.ring import COPYING, ONE_QUEUE, PERSISTENT, Guest, Setup, backend_cpu, case, measure
from xvd.bench.run import Run, cpu, iops
from xvd.bench.sample import Case, Sample, median, median_of, ratio
from xvd.blkif.nodes import BackendAssignment
from xvd.engines.interface import Engine
from xvd.engines.uri import open_engine
from xvd.frontend.disk import Disk
from xvd.frontend.load import Job
from xvd.machine.emulated.service import EmulatedHost
from xvd.toolstack.vbd import Vbd, attach, create_guest, detach
from xvd.toolstack.xldisk import XlDisk
from xvd.types import Domid

SMALL = replace(ONE_QUEUE, pool_pages=32)
"""Of many idle disks: a domain has grants for so many with so few pages each."""


def scale(run: Run) -> Report:
    """The cost of a request over the ring's pages; what idle disks cost; how fast disks come."""
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
    count = max(8, round(40 * min(1.0, run.scale)))  # a domain's quota of nodes has room for them
    found = [asyncio.run(_many(count)) for _ in range(run.rounds)]
    medians = {name: median_of([one[name] for one in found]) for name in found[0]}
    run.tick("idle disks")
    return Report(
        "scale",
        "What must not grow with rings and disks",
        f"Null storage, 4 KiB random reads, depth 32, one queue; then {count} disks of one guest "
        "with a queue each on one daemon, which holds the frontends too.",
        [
            Table(("ring pages", "IOPS", "front ns/op", "back ns/op", "cost against one"), rows),
            Table((f"{count} disks", ""), list(medians.items())),
        ],
        Plot("ring pages", "CPU ns of an operation, both ends",
             {"4 KiB": [(int(name), median(rounds[name], _cost)) for name in names]}, True),
        ratios={
            "cost of an operation, 64 ring pages against 1": ratio(rounds, "64", "1", _cost),
            **medians,
        },
    )  # fmt: skip


def _cost(sample: Sample) -> float:
    return (sample.front_ns or 0) + (sample.back_ns or 0)


async def _many(count: int) -> dict[str, float]:
    """Attach many disks, look at what they cost when idle, and detach them."""

    async def opener(assignment: BackendAssignment) -> Engine:
        return open_engine("null:64M")

    others = threading.enumerate()
    async with EmulatedHost() as host, contextlib.AsyncExitStack() as stack:
        back = host.machine(Domid(0))
        store = await back.xenstore()
        stack.push_async_callback(store.close)
        host.create_domain(Domid(1))
        await create_guest(store, Domid(1), "guest")
        server = Server(back, store, opener, settings=PERSISTENT)
        await server.start()
        stack.push_async_callback(server.close)
        machine = host.machine(Domid(1))
        guest_store = await machine.xenstore()
        stack.push_async_callback(guest_store.close)
        vbds: list[Vbd] = []
        memory, firsts = _resident(), []

        async def one(number: int) -> Disk:
            begun = time.monotonic()
            # Names beyond xvdzz are numbers: the extended scheme, bit 28 and 256 to a disk.
            vdev = f"{1 << 28 | number << 8}"
            vbd = await attach(store, Domid(1), XlDisk(target="null:64M", vdev=vdev))
            vbds.append(vbd)
            disk = await Disk.open(machine, guest_store, f"device/vbd/{vbd.vdev}", settings=SMALL)
            await disk.read(0, 4096)
            firsts.append(time.monotonic() - begun)
            return disk

        alone = await one(0)
        first_alone = firsts.pop()
        begun = time.monotonic()
        disks = [alone, *await asyncio.gather(*(one(n) for n in range(1, count)))]
        attached = time.monotonic() - begun
        used = (_resident() - memory) / count
        cpu_s = backend_cpu(others)
        await asyncio.sleep(1.0)
        cpu_s = backend_cpu(others) - cpu_s
        for disk in disks:
            await disk.close()
        for vbd in vbds:
            await detach(store, vbd)
    return {
        "attach to first I/O, alone, ms": first_alone * 1000,
        "attached all at once, s": attached,
        "memory of a disk, both ends, KiB": used / 1024,
        "CPU of all threads while idle, ms/s": cpu_s * 1000,
    }


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


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

    sample = await measure(setup, at_begin=began, at_end=ended)
    for task in squeezing:
        task.cancel()
    return sample
