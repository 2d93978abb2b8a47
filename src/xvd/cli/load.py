# SPDX-License-Identifier: Apache-2.0
"""``xvd load``: the compiled load generator as a frontend of its own, on any disk."""

import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from xvd import joining
from xvd.bench.report import machine as describe_machine
from xvd.bench.ring import COPYING, MAPPING, PERSISTENT, Setup, filling, measure, sample_of
from xvd.bench.sample import Sample, median
from xvd.blkif.vdev import disk_name, vdev_number
from xvd.cli import common, completion, output, running
from xvd.cli.machines import open_machine
from xvd.cli.storage import Layers
from xvd.engines.text import parse_size
from xvd.errors import ConfigError
from xvd.frontend.load import Job, run_load
from xvd.frontend.settings import Settings
from xvd.types import Domid

MODES = {"persistent": PERSISTENT, "mapping": MAPPING, "copy": COPYING}

AnyGuest = Annotated[
    int | None,
    typer.Argument(
        min=0,
        help="A guest, whose disk it is; none: one of our own.",
        autocompletion=completion.guests,
    ),
]
FrontSettings = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="As of xvd nbd.",
        autocompletion=completion.front_settings,
    ),
]


def load(
    guest: AnyGuest = None,
    vdev: common.Vdev = "xvda",
    host: common.HostOrXen = None,
    engine: Annotated[
        str, typer.Option("--engine", help="Of a disk of our own: the storage.")
    ] = "memory:256M",
    layer: Layers = [],  # noqa: B006  typer needs a literal
    mode: Annotated[
        str, typer.Option("--mode", help="Of a disk of our own: persistent, mapping or copy.")
    ] = "persistent",
    depth: Annotated[int, typer.Option("--depth", min=1, max=2048)] = 32,
    size: Annotated[str, typer.Option("--size", help="Of one operation.")] = "4K",
    span: Annotated[str, typer.Option("--span", help="Of the disk, from its beginning.")] = "256M",
    operations: Annotated[int, typer.Option("--operations", min=1)] = 200_000,
    writes: Annotated[int, typer.Option("--writes", min=0, max=100, help="Per cent.")] = 0,
    sequential: Annotated[bool, typer.Option("--sequential", help="Not at random.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Write the span first; compare all that is read.")
    ] = False,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Medians are of so many.")] = 1,
    setting: FrontSettings = ["max_queues=1"],  # noqa: B006  typer needs a literal
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Copy nothing at this end: data stays granted.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=1)] = 1,
    json: common.Json = False,
) -> int:
    """Do operations on a disk as fast as it goes, and say how fast that was.

    The disk is one of our own, on an emulated host of this process, or a guest's: then this is its
    frontend, as `xvd nbd` is. What the guest's disk holds within the span is lost with --writes and
    --verify. The status is 1 if an operation failed, or read what had not been written. A span that
    is longer than the disk is cut to it.
    """
    if mode not in MODES:
        raise ConfigError(f"there is no mode {mode!r}; there are {', '.join(MODES)}")
    job = Job(
        parse_size(size), depth, parse_size(span), operations, writes, sequential, verify, seed,
        in_place,
    )  # fmt: skip
    settings = Settings.of(setting)
    own = Setup(engine, tuple(layer), MODES[mode], settings, job, filled=True)

    def once() -> Awaitable[Sample]:
        if guest is None:
            return measure(own)
        return _on(host, Domid(guest), vdev_number(vdev), job, settings)

    samples = _measured(once, runs)
    if (found := int(samples[0].counts["span"])) < job.span:
        job = replace(job, span=found)
        sys.stderr.write(f"xvd: the disk has {found} bytes, and the span no more than those\n")
    what = engine if guest is None else disk_name(guest, str(vdev_number(vdev)))
    (_print_json if json else _print)(what, job, samples)
    return 1 if any(sample.errors for sample in samples) else 0


def _measured(once: Callable[[], Awaitable[Sample]], runs: int) -> list[Sample]:
    samples: list[Sample] = []

    async def repeat() -> int:
        for _ in range(runs):
            samples.append(await once())
        return 0

    running.run(repeat())
    return samples


async def _on(host: Path | None, guest: Domid, vdev: int, job: Job, settings: Settings) -> Sample:
    """The job on a guest's disk, by its frontend."""
    machine, _ = await open_machine(host, guest)
    store = await machine.xenstore()
    path = f"device/vbd/{vdev}"
    try:
        await joining.demand_disk(store, guest, vdev)
        if job.verify:
            await run_load(machine, store, path, filling(job), settings=settings)
        result = await run_load(machine, store, path, job, settings=settings)
    finally:
        await store.close()
        machine.close()
    return replace(sample_of(job, result, 0.0, {}), back_ns=None)


def _name(job: Job) -> str:
    order = "sequential" if job.sequential else "random"
    return f"{job.size} bytes, {order}, depth {job.depth}, {job.write_percent}% writes"


def _print_json(what: str, job: Job, samples: list[Sample]) -> None:
    writing = job.write_percent == 100
    jobs = [sample.as_fio(f"{what}: {_name(job)}", writing=writing) for sample in samples]
    more = [
        {"checksum": s.checksum, "front_ns": s.front_ns, "back_ns": s.back_ns, **s.counts}
        for s in samples
    ]
    output.print_json({"machine": describe_machine(), "jobs": jobs, "xvd": more})


def _print(what: str, job: Job, samples: list[Sample]) -> None:
    cpu = [f"front {median(samples, lambda s: s.front_ns or 0):,.0f} ns/op"]
    if samples[0].back_ns is not None:
        cpu.append(f"back {median(samples, lambda s: s.back_ns or 0):,.0f} ns/op")
    output.tell(
        f"{what}, {_name(job)}: {median(samples, lambda s: s.iops):,.0f} IOPS, "
        f"{median(samples, lambda s: s.mib_per_s):,.0f} MiB/s, {', '.join(cpu)}, "
        f"errors {sum(s.errors for s in samples)}, checksum {samples[0].checksum or '-'}\n"
    )
