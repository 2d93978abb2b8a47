# SPDX-License-Identifier: Apache-2.0
"""``xvd bench``: what the data path does on this machine, side by side with what one could use.

Every figure of a run is taken in that run; only ratios mean anything on another day.
"""

import asyncio
import json as json_format
import os
import platform
import shutil
import statistics
import subprocess
import sys
from typing import Annotated, Any

import typer
from rich.progress import track

from xvd.backend.server import Server
from xvd.backend.settings import Settings
from xvd.blkif.nodes import BackendAssignment
from xvd.cli import common
from xvd.engines.interface import Engine
from xvd.engines.uri import open_engine, parse_size
from xvd.frontend.load import LoadResult, run_load
from xvd.frontend.settings import Settings as FrontendSettings
from xvd.machine.emulated.service import EmulatedHost
from xvd.toolstack.vbd import attach, create_guest, detach
from xvd.toolstack.xldisk import XlDisk
from xvd.types import Domid

GUEST = Domid(1)
SPAN = 256 << 20


def bench(
    engine: Annotated[
        list[str], typer.Option("--engine", help="Storage to measure; may be given several times.")
    ] = ["null:256M", "memory:256M"],  # noqa: B006  typer needs a literal
    depth: Annotated[int, typer.Option("--depth", min=1, max=1024)] = 32,
    size: Annotated[str, typer.Option("--size", help="Of one operation.")] = "4K",
    operations: Annotated[int, typer.Option("--operations", min=1)] = 200_000,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Medians are of so many.")] = 5,
    writes: Annotated[int, typer.Option("--writes", min=0, max=100, help="Per cent.")] = 0,
    peer: Annotated[
        bool, typer.Option(help="Measure fio over NBD to nbdkit memory beside it, if it is there.")
    ] = True,
    seed: Annotated[int, typer.Option("--seed", min=1)] = 1,
    json: common.Json = False,
) -> int:
    """Measure random access through the ring: mapping and grant copy, one queue, event-driven."""
    job = {
        "depth": depth,
        "size": parse_size(size),
        "operations": operations,
        "write_percent": writes,
        "seed": seed,
    }
    rows: list[dict[str, Any]] = []
    cases = [(uri, copying) for uri in engine for copying in (False, True)]
    for uri, copying in track(cases, "measuring", transient=True, console=common.stderr()):
        results = [asyncio.run(_measure(uri, copying, job)) for _ in range(runs)]
        rows.append(_row(uri, "grant copy" if copying else "mapping", results))
    if peer and writes == 0 and shutil.which("fio") and shutil.which("nbdkit"):
        figures = [_fio_over_nbdkit(depth, int(job["size"])) for _ in range(runs)]
        name = "fio over NBD to nbdkit memory"
        rows.append({"what": name, "mode": "", "iops": statistics.median(figures), "runs": figures})
    report = {"machine": _machine(), "job": job, "results": rows}
    if json:
        common.print_json(report)
    else:
        _print(report)
    return 0


async def _measure(uri: str, copying: bool, job: dict[str, Any]) -> LoadResult:
    """One run on a machine of its own."""
    storage = open_engine(uri)

    async def opener(assignment: BackendAssignment) -> Engine:
        return storage

    async with EmulatedHost() as host:
        back = host.machine(Domid(0))
        store = await back.xenstore()
        host.create_domain(GUEST)
        await create_guest(store, GUEST, "guest")
        server = Server(back, store, opener, settings=Settings(copying=copying))
        await server.start()
        vbd = await attach(store, GUEST, XlDisk(target=uri, vdev="xvda"))
        front = host.machine(GUEST)
        guest_store = await front.xenstore()
        span = min(SPAN, storage.info.size)
        path = f"device/vbd/{vbd.vdev}"
        # First the disk is filled, or the reads would be of nothing and their checksum no proof; by
        # one queue, or which of two writes to a block is the last would be left to chance.
        fill = job | {"write_percent": 100, "operations": span // job["size"]}
        one = FrontendSettings(max_queues=1)
        await run_load(front, guest_store, path, span=span, settings=one, **fill)
        result = await run_load(front, guest_store, path, span=span, **job)
        await detach(store, vbd)
        await server.close()
        await guest_store.close()
        await store.close()
    return result


def _row(uri: str, mode: str, results: list[LoadResult]) -> dict[str, Any]:
    figures = [round(result.iops) for result in results]
    return {
        "what": uri,
        "mode": mode,
        "iops": statistics.median(figures),
        "runs": figures,
        "errors": sum(result.errors for result in results),
        "checksum": f"{results[0].checksum:016x}",
    }


def _fio_over_nbdkit(depth: int, size: int) -> int:
    """IOPS of fio's NBD engine on nbdkit's memory plugin, 2 seconds."""
    fio = (
        "fio --name=x --ioengine=nbd --uri=$uri --rw=randread --time_based --runtime=2 "
        f"--bs={size} --iodepth={depth} --size={SPAN} --output-format=json --output=/dev/fd/3 "
        "3>&1 >/dev/null 2>/dev/null"
    )
    command = ["nbdkit", "-U", "-", "memory", str(SPAN), "--run", fio]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    iops: float = json_format.loads(text[text.index("{") :])["jobs"][0]["read"]["iops"]
    return round(iops)


def _machine() -> dict[str, object]:
    return {
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def _print(report: dict[str, Any]) -> None:
    job = report["job"]
    sys.stdout.write(
        f"{job['size']} bytes, random, {job['write_percent']}% writes, depth {job['depth']}, "
        f"seed {job['seed']}; {report['machine']['cpus']} CPUs\n"
    )
    best = report["results"][-1]["iops"]
    for row in report["results"]:
        ratio = f"{row['iops'] / best:6.2f}" if best else ""
        sys.stdout.write(
            f"{row['what']:<32}{row['mode']:<12}{row['iops']:>10,.0f} IOPS {ratio}"
            f"  {row.get('checksum', '')}\n"
        )
    sys.stdout.write("(the last column but one: against the last row)\n")
