# SPDX-License-Identifier: Apache-2.0
"""Instructions of a request at either end, counted by callgrind.

A clock measures the machine and whatever else runs on it; this counts what our own code does. Both
ends are stepped in turn by one thread, with all that is under way in each step: one request shows
what a step costs, many show what a request does. What the kernel does is not counted.
"""

import re
import subprocess
import sys
from pathlib import Path

from xvd.bench.peers import NotInstalled, missing
from xvd.bench.report import Plot, Report, Table
from xvd.bench.run import Run
from xvd.blkif.abi import Abi, Op, nr_ents
from xvd.dataplane.front import FrontQueue
from xvd.dataplane.load import Load
from xvd.dataplane.queue import BackendQueue
from xvd.dataplane.ring import FrontRing
from xvd.engines.uri import open_engine
from xvd.errors import ConfigError
from xvd.machine.emulated.host import Host
from xvd.machine.emulated.machine import EmulatedMachine
from xvd.machine.xs.client import XenstoreClient
from xvd.types import Domid

ENTRIES = nr_ents(1, Abi.X86_64)
STEPS = {
    "front": "__pyx_f_3xvd_9dataplane_4load_step",
    "back": "__pyx_f_3xvd_9dataplane_5queue_step",
}
"""The compiled functions that are one round of an end, as the linker knows them."""


CASES = (("null:1M", 1), ("null:1M", ENTRIES), ("memory:1M", ENTRIES))


async def _no_store() -> XenstoreClient:
    raise AssertionError("a queue needs no xenstore")


def drive(engine: str, depth: int, operations: int) -> None:
    """Write 4 KiB at random places with persistent grants, stepping one end, then the other."""
    host = Host()
    ends = []
    for domid in (Domid(0), Domid(1)):
        host.create_domain(domid)
        ends.append(EmulatedMachine(host.open(domid), _no_store))
    back, front = ends
    ring = front.grants.share(Domid(0), 1)
    pages = front.grants.share(Domid(0), ENTRIES)
    port = front.event_channels.alloc_unbound(Domid(0))
    FrontRing(ring.view, ENTRIES, Abi.X86_64.number).init()
    queue = FrontQueue(
        ring.view, ENTRIES, Abi.X86_64.number, pages, port, segments_max=1, persistent=True
    )
    load = Load(
        queue, depth=depth, size=4096, span=1 << 20, operations=operations, write_percent=100
    )
    storage = open_engine(engine)
    grants = back.grants.foreign(Domid(1))
    mapping = grants.map(ring.grefs)
    server = BackendQueue(
        mapping.view, ENTRIES, Abi.X86_64.number, grants,
        back.event_channels.bind_interdomain(Domid(1), port.port), storage.open_channel(),
        capacity=storage.info.size // 512, offered=1 << Op.WRITE, persistent=True,
    )  # fmt: skip
    while load.result[0] < operations:
        load.step()
        server.step()


def count(engine: str, depth: int, operations: int, directory: Path) -> dict[str, int]:
    """Instructions of either end for all of it."""
    out = directory / "callgrind.out"
    words = [sys.executable, "-m", "xvd.bench.steps", engine, str(depth), str(operations)]
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
    """What a request and a step take, in instructions."""
    if missing("valgrind"):
        raise NotInstalled("valgrind")
    operations = run.operations(10_000)
    rows = []
    # Starting Python under valgrind takes ten seconds: a look is at one case.
    for engine, depth in CASES if run.scale >= 1 else CASES[-1:]:
        found = count(engine, depth, operations, run.directory)
        name = f"{engine.partition(':')[0]}, {depth} in a step"
        rows.append((name, found["front"] / operations, found["back"] / operations))
    return Report(
        "instructions",
        "Instructions of a request",
        "Random writes of 4 KiB with persistent grants, both ends stepped in turn by one thread, "
        "counted by callgrind, which counts a copying instruction once for every 8 bytes: 512 of "
        "the front's are the data, and as many of the back's with memory storage.",
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
    drive(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
