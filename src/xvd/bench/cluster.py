# SPDX-License-Identifier: Apache-2.0
"""An image of a Ceph cluster behind the ring, beside fio's own engine for such images."""

import os
from dataclasses import replace
from typing import Final

from xvd.bench.peers import NotInstalled, fio_rbd, missing
from xvd.bench.report import Cell, Plot, Report, Table
from xvd.bench.ring import Setup, case
from xvd.bench.run import Run, iops
from xvd.bench.sample import ratio
from xvd.frontend.load import Job

IMAGES = "XVD_BENCH_RBD"
"""The variable that names two images to be overwritten: POOL/IMAGE,POOL/IMAGE. One is for reads, as
what is read has to stay as it is. The cluster is that of ``$CEPH_CONF``, as with Ceph's tools."""

_NAMES: Final = {"xvd": "xvd", "fio": "fio's rbd engine"}

METHOD = """The same images of the same cluster, whose client library is the same too; 4 KiB, one
queue, depth 32."""


def cluster(run: Run) -> Report:
    """Measure images that the user names."""
    names = os.environ.get(IMAGES, "").split(",")
    if lacking := missing("fio"):
        raise NotInstalled(*lacking)
    if len(names) != 2 or not all("/" in name for name in names):
        raise NotInstalled(f"two images of a cluster: {IMAGES}=POOL/IMAGE,POOL/IMAGE")
    read = Job(operations=run.operations(20_000), seed=run.seed, span=64 << 20)
    jobs = {"random read": read, "random write": replace(read, write_percent=100)}
    fill = replace(
        read, write_percent=100, sequential=True, operations=run.operations(read.span // read.size)
    )
    conf = f",conf={os.environ['CEPH_CONF']}" if os.environ.get("CEPH_CONF") else ""
    cases = []
    for name, (what, job) in zip(names, jobs.items(), strict=True):
        pool, _, image = name.partition("/")
        uri = f"rbd:{name}{conf}"
        # Once: what is written is not the same each time, and what is read is to be.
        case("fill", Setup(uri, job=fill)).measure()
        cases.append(case(f"xvd: {what}", Setup(uri, job=job)))
        cases.append(fio_rbd(f"fio: {what}", pool, image, job, run.seconds(3)))
    rounds = run.measure(cases)
    ratios = {what: ratio(rounds, f"xvd: {what}", f"fio: {what}") for what in jobs}
    found = {who: {what: iops(rounds[f"{who}: {what}"]) for what in jobs} for who in _NAMES}
    rows: list[tuple[Cell, ...]] = [
        (what, *(found[who][what] for who in _NAMES), ratios[what]) for what in jobs
    ]
    return Report(
        "cluster",
        "An image of a Ceph cluster",
        METHOD.replace("\n", " "),
        [Table(("", "xvd: IOPS", "fio's rbd engine: IOPS", "xvd of: fio"), rows)],
        Plot("", "IOPS", {name: list(found[who].items()) for who, name in _NAMES.items()}),
        ratios={f"{what}, against fio's rbd engine": value for what, value in ratios.items()},
    )
