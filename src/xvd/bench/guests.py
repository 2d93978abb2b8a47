# SPDX-License-Identifier: Apache-2.0
"""Several guests, each a process of its own, on one backend: their memory is mapped across
processes, and unmapping it is a real TLB shootdown.

Run as a module it is such a guest: ``DIR DOMID PATH JOB SETTINGS`` (the last two as JSON); it says
"ready", waits for a line, does the job, and prints the result as JSON.
"""

import asyncio
import json
import os
import sys
import tempfile
import threading
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xvd.backend.server import Server
from xvd.bench.ring import Setup, backend_counters, backend_cpu
from xvd.bench.sample import Sample
from xvd.blkif.assignment import BackendAssignment
from xvd.engines.interface import Engine
from xvd.engines.uri import open_engine
from xvd.frontend.load import Job, LoadResult, run_load
from xvd.frontend.settings import Settings
from xvd.machine.emulated.service import EmulatedHost, connect
from xvd.toolstack.vbd import attach, create_guest, detach
from xvd.toolstack.xldisk import XlDisk
from xvd.types import Domid


def shootdowns() -> int:
    """TLB shootdowns of all CPUs since the machine was started; 0 if it does not tell."""
    for line in Path("/proc/interrupts").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name.strip() == "TLB":
            return sum(int(word) for word in rest.split() if word.isdigit())
    return 0


async def measure(setup: Setup, guests: int) -> Sample:
    """The setup's job on a disk of each guest, all at once."""

    async def opener(_: BackendAssignment) -> Engine:
        return open_engine(setup.engine, layers=setup.layers)

    others = threading.enumerate()
    with tempfile.TemporaryDirectory(prefix="xvd-bench-") as directory:
        async with EmulatedHost() as host:
            await host.listen(directory)
            back = host.machine(Domid(0))
            store = await back.xenstore()
            server = Server(back, store, opener, settings=setup.back)
            await server.start()
            disks = []
            for domid in map(Domid, range(1, guests + 1)):
                host.create_domain(domid)
                await create_guest(store, domid, f"guest{domid}")
                disks.append(await attach(store, domid, XlDisk(target=setup.engine, vdev="xvda")))
            try:
                vdevs = [disk.vdev for disk in disks]
                sample = await _run(setup, directory, vdevs, server, others)
                for disk in disks:
                    await detach(store, disk)
            finally:
                await server.close()
                await store.close()
    return sample


async def _run(
    setup: Setup,
    directory: str,
    vdevs: Sequence[int],
    server: Server,
    others: Collection[threading.Thread],
) -> Sample:
    children = await start(directory, [f"device/vbd/{vdev}" for vdev in vdevs], setup)
    shot, cpu = shootdowns(), 0.0
    counts: dict[str, float] = {}
    results = asyncio.ensure_future(go(children))
    while not results.done():
        # The counters go with their connections: what was seen last is of nearly all.
        for name, value in backend_counters(server).items():
            counts[name] = max(value, counts.get(name, 0))
        cpu = max(cpu, backend_cpu(others))
        await asyncio.sleep(0.05)
    counts["shootdowns"] = shootdowns() - shot
    return together(setup.job, await results, cpu, counts)


async def start(
    directory: str, paths: Sequence[str], setup: Setup
) -> list[asyncio.subprocess.Process]:
    """Start guests, domains 1 and on, for the setup's job on the disk that each has there; they
    are ready, and wait for `go`."""
    words = [json.dumps(asdict(value)) for value in (setup.job, setup.front)]
    children = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-m", "xvd.bench.guests", directory, str(domid), path, *words,
            stdin=-1, stdout=-1,
        )
        for domid, path in enumerate(paths, 1)
    ]  # fmt: skip
    for child in children:
        assert child.stdout is not None
        await child.stdout.readline()
    return children


async def go(children: Sequence[asyncio.subprocess.Process]) -> list[LoadResult]:
    """Let them do it, and end."""
    outputs = await asyncio.gather(*(child.communicate(b"go\n") for child in children))
    return [LoadResult(**json.loads(out)) for out, _ in outputs]


def together(
    job: Job, results: Sequence[LoadResult], back_s: float, counts: dict[str, float]
) -> Sample:
    """Make one measurement of all guests'. back_s: CPU seconds of the backend."""
    operations = sum(one.operations for one in results)
    ns = max(one.ended_ns for one in results) - min(one.begun_ns for one in results)
    return Sample(
        operations=operations,
        seconds=ns / 1e9,
        bytes=operations * job.size,
        errors=sum(one.errors for one in results),
        front_ns=sum(one.cpu_s for one in results) / operations * 1e9,
        back_ns=back_s / operations * 1e9,
        counts=counts,
    )


async def _guest(directory: str, domid: int, path: str, job: Job, settings: Settings) -> LoadResult:
    machine = connect(Path(directory), Domid(domid))
    store = await machine.xenstore()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    try:
        return await run_load(machine, store, path, job, settings=settings)
    finally:
        await store.close()
        machine.close()


def main(arguments: Sequence[str]) -> None:
    """Be a guest."""
    directory, domid, path = arguments[0], int(arguments[1]), arguments[2]
    job: dict[str, Any] = json.loads(arguments[3])
    settings: dict[str, Any] = json.loads(arguments[4])
    result = asyncio.run(_guest(directory, domid, path, Job(**job), Settings(**settings)))
    sys.stdout.write(json.dumps(asdict(result)) + "\n")
    sys.stdout.flush()
    os._exit(0)  # nothing is left to be given back, and the interpreter's end costs the others time


if __name__ == "__main__":
    main(sys.argv[1:])
