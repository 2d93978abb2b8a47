# SPDX-License-Identifier: Apache-2.0
"""An image format behind the ring, beside the same storage daemon alone, and beside qemu-nbd."""

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Final

from xvd.bench.peers import NotInstalled, fio_nbd, missing
from xvd.bench.report import Cell, Plot, Report, Table
from xvd.bench.ring import Setup, case
from xvd.bench.run import Run, iops
from xvd.bench.sample import Rounds, ratio
from xvd.bench.vhost import CLIENTS, build_client, image, vhost
from xvd.frontend.load import Job

METHOD = """A qcow2 image of 256 MiB in tmpfs, all of it allocated, opened with O_DIRECT; 4 KiB,
one queue, depth 32. The storage daemon serves it by vhost-user-blk to libblkio's client, which
sleeps when it has nothing to do, or never; behind xvd's ring the same daemon serves it to xvd.
qemu-nbd serves it to fio."""

_NAMES: Final = {
    "sleeping": "vhost-user-blk, client sleeps", "polling": "vhost-user-blk, client polls",
    "xvd": "xvd", "qemu-nbd": "qemu-nbd, fio",
}  # fmt: skip


def formats(run: Run) -> Report:
    """Measure qcow2 behind the ring."""
    if lacking := missing("qemu-storage-daemon", "qemu-img", "qemu-nbd", "fio"):
        raise NotInstalled(*lacking)
    client = build_client(run.directory)
    read = Job(operations=run.operations(100_000), seed=run.seed)
    jobs = {"random read": read, "random write": replace(read, write_percent=100)}
    # What is read has to stay as it is, or its checksum would prove nothing.
    images = {what: _qcow2(run.directory, what.rpartition(" ")[2]) for what in jobs}
    cases = []
    for what, job in jobs.items():
        qcow2 = images[what]
        cases += [
            vhost(f"{how}: {what}", client, qcow2, job, *flags, qcow2=True)
            for how, flags in CLIENTS.items()
        ]
        cases.append(case(f"xvd: {what}", Setup(f"qcow2:{qcow2}", job=job)))
        seconds = run.seconds(3)
        cases.append(
            fio_nbd(f"qemu-nbd: {what}", "qemu-nbd", qcow2, job, seconds, image_format="qcow2")
        )
    try:
        return _report(list(jobs), run.measure(cases))
    finally:
        for qcow2 in images.values():
            qcow2.unlink()


def _qcow2(directory: Path, name: str) -> Path:
    """An image in memory with something in all of it."""
    raw = image(directory, f"formats-{name}")
    made = raw.with_suffix(".qcow2")
    command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(made)]
    subprocess.run(command, check=True)
    raw.unlink()
    return made


def _report(whats: list[str], rounds: Rounds) -> Report:
    found = {key: {what: iops(rounds[f"{key}: {what}"]) for what in whats} for key in _NAMES}
    peers = [key for key in _NAMES if key != "xvd"]
    ratios = {
        key: {what: ratio(rounds, f"xvd: {what}", f"{key}: {what}") for what in whats}
        for key in peers
    }
    rows: list[tuple[Cell, ...]] = [
        (what, *(found[key][what] for key in _NAMES), *(ratios[key][what] for key in peers))
        for what in whats
    ]
    columns = ("", *(f"{name}: IOPS" for name in _NAMES.values()),
               *(f"xvd of: {_NAMES[key]}" for key in peers))  # fmt: skip
    return Report(
        "formats",
        "An image format",
        METHOD.replace("\n", " "),
        [Table(columns, rows)],
        Plot("", "IOPS", {name: list(found[key].items()) for key, name in _NAMES.items()}),
        ratios={
            f"{what}, against {_NAMES[key]}": value
            for key in peers
            for what, value in ratios[key].items()
        },
    )
