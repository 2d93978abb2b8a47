# SPDX-License-Identifier: Apache-2.0
"""Instructions of a request at either end, counted by callgrind.

A clock measures the machine and whatever else runs on it; this counts what our own code does. Both
ends are stepped alternately by one thread, with all that is under way in each step: one request
shows what a step costs, many show what a request does. What the kernel does is not counted.
"""

import re
import subprocess
import sys
from pathlib import Path

from xvd.bench.pair import Pair
from xvd.bench.peers import NotInstalled, missing
from xvd.bench.report import Plot, Report, Table
from xvd.bench.run import Run
from xvd.dataplane.loop.thread import BUDGET
from xvd.errors import ConfigError
from xvd.frontend.load import Job

STEPS = {
    "front": "__pyx_f_3xvd_9dataplane_5front_4load_step",
    "back": "__pyx_f_3xvd_9dataplane_4back_5queue_step",
}
"""The compiled functions that are one round of an end, as the linker knows them."""

CASES = (
    ("null:1M", 1, 1),
    ("null:1M", BUDGET, 1),
    ("null:1M", BUDGET, 64),
    ("memory:1M", BUDGET, 1),
)
"""Storage, requests of a step, and pages of the ring."""


def drive(engine: str, depth: int, ring_pages: int, operations: int) -> None:
    """Write 4 KiB at random places with persistent grants, stepping one end, then the other."""
    job = Job(depth=depth, span=1 << 20, operations=operations, write_percent=100)
    pair = Pair(engine, job, ring_pages=ring_pages)
    while pair.load.result[0] < operations:
        pair.load.step()
        pair.back.step()


def count(case: tuple[str, int, int], operations: int, directory: Path) -> dict[str, int]:
    """Instructions of either end for all of it."""
    out = directory / "callgrind.out"
    words = [sys.executable, "-m", "xvd.bench.steps", *map(str, case), str(operations)]
    subprocess.run(
        ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", *words],
        check=True, capture_output=True,
    )  # fmt: skip
    said = subprocess.run(
        ["callgrind_annotate", "--inclusive=yes", "--threshold=100", str(out)],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    found = {}
    for side, name in STEPS.items():
        line = re.search(rf"^ *([\d,]+) .*{name}\b", said, re.MULTILINE)
        if line is None:
            raise ConfigError(f"callgrind has no {name}: the compiled modules must not be stripped")
        found[side] = int(line[1].replace(",", ""))
    return found


def instructions(run: Run) -> Report:
    """Measure what a request and a step take, in instructions."""
    if missing("valgrind"):
        raise NotInstalled("valgrind")
    operations = run.operations(10_000)
    rows = []
    # Starting Python under valgrind takes ten seconds: a quick run has one case.
    for case in CASES if run.scale >= 1 else CASES[-1:]:
        engine, depth, pages = case
        found = count(case, operations, run.directory)
        name = f"{engine.partition(':')[0]}, {depth} in a step"
        name += f", {pages} pages of ring" if pages > 1 else ""
        rows.append((name, found["front"] / operations, found["back"] / operations))
    return Report(
        "instructions",
        "Instructions of a request",
        "Random writes of 4 KiB with persistent grants, both ends stepped alternately by one "
        "thread, counted by callgrind, which counts a copying instruction once for every 8 bytes: "
        "512 of the front's are the data, and as many of the back's with memory storage.",
        [Table(("storage", "front", "back"), rows)],
        Plot(
            "",
            "instructions of a request",
            {
                "front": [(name, front) for name, front, _ in rows],
                "back": [(name, back) for name, _, back in rows],
            },
        ),
    )


if __name__ == "__main__":
    drive(sys.argv[1], *map(int, sys.argv[2:]))
