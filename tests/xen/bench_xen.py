# SPDX-License-Identifier: Apache-2.0
"""Null storage behind three backends in one boot: xvd's, Linux's xen-blkback, and QEMU's qdisk.

Not a test: `xen-rig/test trixie tests/xen/bench_xen.py` prints the tables. Two frontends: a Linux
guest with fio, and xvd's load generator in dom0, which costs far less and so shows the backend.
Only ratios of one boot mean anything: all of it is in software emulation. The load generator's
part has not come to its end within the time of a run so far (XEN_LIMIT, seconds).
"""

import json
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from test_xen_frontend import qemu_of_dom0
from xen_host import Backend, Slot, note, sh, typed

ROUNDS = 5
SECONDS = 3
DISKS = {
    "xvd": Slot.TAP.line("null:1G", "xvdb"),
    "xen-blkback": "phy:/dev/nullb0,xvdc,w",
    "qdisk": "format=raw,vdev=xvdd,access=rw,backendtype=qdisk,target=/dev/nullb1",
}


@dataclass(frozen=True)
class Job:
    rw: str
    size: int
    depth: int
    count: int  # operations of the load generator; fio's are as many as it can

    def __str__(self) -> str:
        return f"{self.rw} {self.size >> 10}K depth {self.depth}"


JOBS = [
    Job("randread", 4096, 32, 10_000),
    Job("randwrite", 4096, 32, 10_000),
    Job("randread", 4096, 1, 2_000),
    Job("read", 131072, 8, 2_000),
]


@dataclass(frozen=True)
class Figure:
    iops: float
    dom0_us: float


def dom0_seconds() -> float:
    """CPU time of domain 0 so far."""
    [row] = [line for line in sh("xl list").splitlines() if line.startswith("Domain-0")]
    return float(row.split()[-1])


def measured(run: Callable[[], tuple[float, float]]) -> Figure:
    """run: gives operations and seconds."""
    before = dom0_seconds()
    operations, seconds = run()
    return Figure(operations / seconds, (dom0_seconds() - before) / operations * 1e6)


def table(title: str, found: dict[tuple[Job, str], list[Figure]]) -> None:
    lines = [title, f"  {'':<24}" + "".join(f"{name:>26}" for name in DISKS)]
    for job in JOBS:
        cells = []
        for name in DISKS:
            ours, others = found[job, "xvd"], found[job, name]
            pairs = zip(ours, others, strict=True)
            times = statistics.median(a.iops / b.iops for a, b in pairs)
            iops = statistics.median(one.iops for one in others)
            cpu = statistics.median(one.dom0_us for one in others)
            cells.append(f"{iops:>7.0f} {times:>6.2f}x {cpu:>6.0f} us")
        lines.append(f"  {job!s:<24}" + "".join(f"{cell:>26}" for cell in cells))
    lines.append(
        "  (IOPS, xvd's as a multiple of it, dom0's CPU time per operation; "
        f"medians of {ROUNDS} rounds)"
    )
    note("\n".join(lines))


@pytest.fixture(scope="module", autouse=True)
def peers(backend: Backend) -> Iterator[None]:
    """Linux's backend serves backend/vbd meanwhile, and ours only the tap slot."""
    sh("modprobe xen-blkback; modprobe null_blk gb=1 nr_devices=2; ulimit -l unlimited")
    assert backend.stop() == 0
    backend.start("--kind", "vbd3")
    yield
    sh("modprobe -r null_blk xen-blkback")


@pytest.fixture
def found() -> dict[tuple[Job, str], list[Figure]]:
    return {(job, name): [] for job in JOBS for name in DISKS}


@pytest.mark.timeout(1500)
@pytest.mark.usefixtures("guests")
def test_a_linux_guest_with_fio(found: dict[tuple[Job, str], list[Figure]]) -> None:
    disks = " ".join(f"-d '{line}'" for line in DISKS.values())
    sh(f"domu -n u1 -m 384 -b {disks}")

    def fio(job: Job, device: str) -> tuple[float, float]:
        said = typed(
            "u1",
            f"fio --name=b --filename=/dev/{device} --direct=1 --ioengine=libaio --rw={job.rw}"
            f" --bs={job.size} --iodepth={job.depth} --size=256m --time_based --runtime={SECONDS}"
            " --norandommap --minimal 2>/dev/null | grep '^3;' | cut -d';' -f8,49",
        )
        read, write = said.split()[-1].split(";")
        return (float(read) + float(write)) * SECONDS, SECONDS

    for _ in range(ROUNDS):
        for job in JOBS:
            for name, device in zip(DISKS, ("xvdb", "xvdc", "xvdd"), strict=True):
                figure = measured(lambda job=job, device=device: fio(job, device))
                found[job, name].append(figure)
    table("A Linux guest with fio, on null storage", found)


@pytest.mark.timeout(1500)
def test_the_load_generator(backend: Backend, found: dict[tuple[Job, str], list[Figure]]) -> None:
    qemu_of_dom0()
    sh("modprobe -r xen-blkfront")

    def load(job: Job) -> tuple[float, float]:
        kind = "--sequential" if not job.rw.startswith("rand") else ""
        writes = 100 if job.rw.endswith("write") else 0
        said = sh(
            f"xvd load 0 xvda --json --size {job.size} --depth {job.depth} --writes {writes}"
            f" --operations {job.count} {kind}"
        )
        [one] = json.loads(said)["jobs"]
        side = one["write" if writes else "read"]
        return side["total_ios"], side["total_ios"] / side["iops"]

    try:
        for _ in range(ROUNDS):
            for name, line in DISKS.items():
                sh(f"xl block-attach 0 '{re.sub('xvd[bcd]', 'xvda', line)}'")
                for job in JOBS:
                    found[job, name].append(measured(lambda job=job: load(job)))
                # Linux's backend and QEMU wait for a frontend that answers; there is none now.
                sh(f"xl block-detach {'' if name == 'xvd' else '-f'} 0 xvda")
        table("xvd's load generator in dom0, on null storage", found)
    finally:
        sh("modprobe xen-blkfront")
