# SPDX-License-Identifier: Apache-2.0
"""Beside what cannot be beaten, and beside what one could use instead."""

import tempfile
from dataclasses import replace
from pathlib import Path

from xvd.bench import peers
from xvd.bench.report import Plot, Report, Table
from xvd.bench.ring import ONE_QUEUE, PERSISTENT, Setup, case
from xvd.bench.run import Run, cpu, iops, mib
from xvd.bench.sample import Case, ratio
from xvd.frontend.load import Job

IMAGE_SIZE = 256 << 20


def limit(run: Run) -> Report:
    """The data path against the C probe: the same ring, copies and notifications, and no more."""
    probe = peers.build_probe(run.directory)
    job = Job(operations=run.operations(300_000), seed=run.seed)
    alone = replace(job, depth=1, operations=run.operations(40_000))
    jobs = {
        "read": job,
        "write": replace(job, write_percent=100),
        "read, depth 1": alone,
    }
    cases: list[Case] = []
    for what, one in jobs.items():
        asleep = replace(PERSISTENT, poll_us=0), replace(ONE_QUEUE, poll_us=0)
        setup = Setup("memory:256M", job=one, filled=True)
        cases += [
            peers.probe(f"probe, events: {what}", probe, one),
            case(f"xvd, events: {what}", replace(setup, back=asleep[0], front=asleep[1])),
            peers.probe(f"probe, polled: {what}", probe, one, "-p"),
            case(f"xvd, polled: {what}", setup),
        ]
    nothing = "probe, polled: null storage"
    cases += [
        peers.probe(nothing, probe, job, "-z", "-p"),
        case("xvd, polled: null storage, read", Setup(job=job)),
        case("xvd, polled: null storage, write", Setup(job=jobs["write"])),
    ]
    rounds = run.measure(cases)
    rows, ratios = [], {}
    for name, samples in rounds.items():
        row: list[str | float] = [name, iops(samples), cpu(samples, "front"), cpu(samples, "back")]
        if name.startswith("xvd"):
            peer = nothing if "null" in name else name.replace("xvd", "probe")
            against = ratio(rounds, name, peer)
            ratios[f"{name}, against the probe"] = against
            row.append(against)
        else:
            row.append("1")
        rows.append(row)
    bars = {
        who: [
            (f"{what}, {how}", ratio(rounds, f"{who}, {how}: {what}", f"probe, {how}: {what}"))
            for what in jobs
            for how in ("events", "polled")
        ]
        for who in ("probe", "xvd")
    }
    columns = ("4 KiB, random, one queue", "IOPS", "front ns/op", "back ns/op", "of the probe")
    return Report(
        "limit",
        "The limit: a C program that only does the work",
        "Memory storage of 256 MiB, persistent grants, depth 32 unless said; the probe has the "
        "same ring, the same two copies and the same events, between two threads. By events is "
        "with `poll_us=0`; polled is as xvd does it by default, which polls for as long as a sleep "
        "costs, beside a probe that never sleeps. Null storage leaves data alone, xvd's as the "
        "probe's; the frontends copy as ever.",
        [Table(columns, rows)],
        Plot("", "IOPS, the probe being 1", bars),
        ratios=ratios,
    )


def storage(run: Run) -> Report:
    """The file engine against fio by io_uring on the same file."""
    if peers.missing("fio"):
        raise peers.NotInstalled("fio")
    places = {"tmpfs": Path("/dev/shm"), "disk, O_DIRECT": run.disk}
    # What is read has to stay as it is, or its checksum would prove nothing.
    images = {(w, k): _image(path, k) for w, path in places.items() for k in ("read", "write")}
    small = Job(operations=run.operations(100_000), seed=run.seed)
    large = Job(
        size=128 << 10, depth=8, sequential=True, operations=run.operations(8000), seed=run.seed
    )
    jobs = {
        "4 KiB random read": small,
        "4 KiB random write": replace(small, write_percent=100),
        "128 KiB sequential read": large,
        "128 KiB sequential write": replace(large, write_percent=100),
    }
    cases: list[Case] = []
    try:
        for where in places:
            for what, job in jobs.items():
                image = images[where, what.rpartition(" ")[2]]
                direct = where != "tmpfs"
                seconds = run.seconds(2)
                name = f"{what}, {where}"
                engine = f"file:{image}"
                cases += [
                    peers.fio_file(f"fio: {name}", image, job, seconds, direct=direct),
                    case(f"xvd: {name}", Setup(engine, job=replace(job, in_place=True))),
                    case(f"copied: {name}", Setup(engine, job=job)),
                ]
        rounds = run.measure(cases)
    finally:
        for image in images.values():
            image.unlink()
    names = [f"{what}, {where}" for where in places for what in jobs]
    rows = []
    for name in names:
        fio, ours, copied = f"fio: {name}", f"xvd: {name}", f"copied: {name}"
        rows.append(
            (name, iops(rounds[fio]), iops(rounds[ours]), mib(rounds[ours]),
             ratio(rounds, ours, fio), iops(rounds[copied]), ratio(rounds, copied, fio))
        )  # fmt: skip
    columns = ("", "fio IOPS", "xvd IOPS", "xvd MiB/s", "of fio", "copied, IOPS", "of fio")
    bars = {
        who: [(name, ratio(rounds, f"{who}: {name}", f"fio: {name}")) for name in names]
        for who in ("xvd", "copied")
    }
    return Report(
        "storage",
        "The storage below: fio straight on the same file",
        "An image of 256 MiB; fio by io_uring, one job, depth 32 for 4 KiB and 8 for 128 KiB. The "
        "frontend's load keeps its data in granted pages, as fio keeps its own in its buffers; "
        "copied is with buffers elsewhere, so that each byte is copied once more.",
        [Table(columns, rows)],
        Plot("", "IOPS, fio being 1", bars),
        ratios={f"{name}, against fio": ratio(rounds, f"xvd: {name}", f"fio: {name}")
                for name in names},
    )  # fmt: skip


def nbd(run: Run) -> Report:
    """The NBD export through the ring against servers that have the image at hand."""
    lacking = peers.missing("fio", "nbdkit", "qemu-nbd")
    if lacking:
        raise peers.NotInstalled(*lacking)
    image = _image(Path("/dev/shm"))
    seconds = run.seconds(3)
    jobs = {
        "4 KiB random read": Job(span=IMAGE_SIZE),
        "4 KiB random write": Job(span=IMAGE_SIZE, write_percent=100),
        "256 KiB sequential read": Job(size=256 << 10, depth=8, sequential=True),
        "256 KiB sequential write": Job(
            size=256 << 10, depth=8, sequential=True, write_percent=100
        ),
    }
    try:
        rounds = run.measure(
            [
                peers.fio_nbd(f"{server}: {what}", server, image, job, seconds)
                for what, job in jobs.items()
                for server in peers.SERVERS
            ]
        )
    finally:
        image.unlink()
    rows: list[tuple[str | float, ...]] = []
    ratios = {}
    for what in jobs:
        others = [f"{server}: {what}" for server in peers.SERVERS if server != "xvd serve"]
        ours = f"xvd serve: {what}"
        found = [ratio(rounds, ours, other) for other in others]
        for other, value in zip(others, found, strict=True):
            ratios[f"{ours}, against {other.partition(':')[0]}"] = value
        figures = [iops(rounds[name]) for name in (*others, ours)]
        rows.append((what, *figures, *found))
    bars = {
        server: [(what, iops(rounds[f"{server}: {what}"])) for what in jobs]
        for server in peers.SERVERS
    }
    columns = ("", "nbdkit file IOPS", "qemu-nbd IOPS", "xvd serve IOPS", "of nbdkit",
               "of qemu-nbd")  # fmt: skip
    return Report(
        "nbd",
        "The NBD export through the ring",
        "fio's NBD engine, depth 32 for 4 KiB and 8 for 256 KiB, on an image of 256 MiB in tmpfs. "
        "The others have the file at hand; xvd goes through frontend, ring and backend first.",
        [Table(columns, rows)],
        Plot("", "IOPS", bars),
        ratios=ratios,
    )


def _image(directory: Path, name: str = "nbd") -> Path:
    """Make an image with something in it, of a name that nobody else's measurement has."""
    number, path = tempfile.mkstemp(prefix=f"xvd-bench-{name}-", suffix=".img", dir=directory)
    piece = bytes(range(256)) * 4096
    with open(number, "wb") as file:
        for _ in range(IMAGE_SIZE // len(piece)):
            file.write(piece)
    return Path(path)
