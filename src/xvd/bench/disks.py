# SPDX-License-Identifier: Apache-2.0
"""What a disk costs that does nothing, and how fast disks come: one daemon, guests in processes.

Run as a module it is such a guest: ``DIR DOMID VDEV...``; it says "ready", and after each line that
it is sent connects all of its disks, reads from each, and says so, or closes them.
"""

import asyncio
import contextlib
import itertools
import os
import resource
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

from xvd.backend.server import POLL_S, RARITY_MAX, Server
from xvd.bench.report import Plot, Report, Table
from xvd.bench.ring import ONE_QUEUE, PERSISTENT, backend_cpu
from xvd.bench.run import Run
from xvd.bench.sample import median_of
from xvd.blkif.assignment import BackendAssignment
from xvd.engines.interface import Engine
from xvd.engines.uri import open_engine
from xvd.errors import PeerClosed
from xvd.frontend.disk import Disk
from xvd.machine.emulated.service import EmulatedHost, connect
from xvd.machine.interface import Machine
from xvd.machine.xs.client import XenstoreClient
from xvd.toolstack.vbd import Vbd, attach, create_guest, detach
from xvd.toolstack.xldisk import XlDisk
from xvd.types import Domid

SETTINGS = replace(ONE_QUEUE, pool_pages=32)
"""Of many idle disks: a domain has grants for so many with so few pages each."""

GUESTS = 10
IDLE_S = POLL_S * RARITY_MAX
"""As long as the daemon takes to poll everything that it polls."""

ALONE = 15
"""So often a disk comes and goes by itself."""


def disks(run: Run) -> Report:
    """One disk alone, again and again, and 200 disks of ten guests at once."""
    scale = min(1.0, run.scale)
    each = max(2, round(20 * scale))
    found = []
    for _ in range(run.rounds):
        found.append(asyncio.run(_round(each, max(3, round(ALONE * scale)), IDLE_S * scale)))
        run.tick("disks")
    figures = {name: median_of([one[name] for one in found]) for name in found[0]}
    alone = [
        (str(number), one["attach to first I/O, alone, ms"]) for number, one in enumerate(found, 1)
    ]
    return Report(
        "disks",
        "What a disk costs that does nothing",
        f"{GUESTS * each} disks of {GUESTS} guests, each a process, with a queue and a page of "
        "ring each, on one daemon, which is the toolstack and the store too. Attached one after "
        "the other, as libxl does it, then connected by all guests at once, and read from.",
        [Table((f"{GUESTS * each} disks", ""), list(figures.items()))],
        Plot("round", "attach to first I/O, alone, ms", {"one disk": alone}),
        ratios=figures,
    )


@contextlib.asynccontextmanager
async def _daemon(directory: str) -> AsyncIterator[tuple[EmulatedHost, XenstoreClient]]:
    async def opener(_: BackendAssignment) -> Engine:
        return open_engine("null:64M")

    async with EmulatedHost() as host:
        await host.listen(directory)
        back = host.machine(Domid(0))
        store = await back.xenstore()
        server = Server(back, store, opener, settings=PERSISTENT)
        await server.start()
        for domid in map(Domid, range(1, GUESTS + 1)):
            host.create_domain(domid)
            await create_guest(store, domid, f"guest{domid}")
        try:
            yield host, store
        finally:
            await server.close()
            await store.close()


async def _round(each: int, alone: int, idle_s: float) -> dict[str, float]:
    others = threading.enumerate()
    with tempfile.TemporaryDirectory(prefix="xvd-bench-") as directory:
        async with _daemon(directory) as (host, store):
            first = median_of(
                [await _come_and_go(store, host.machine(Domid(1))) for _ in range(alone + 1)][1:]
            )
            guests = [await _start(directory, domid, each) for domid in range(1, GUESTS + 1)]
            memory, begun = _resident(), time.monotonic()
            vbds = await asyncio.gather(
                *(_attach(store, Domid(g + 1), each) for g in range(GUESTS))
            )
            await asyncio.gather(*(_tell(guest) for guest in guests))
            attached = time.monotonic() - begun
            used = (_resident() - memory) / (GUESTS * each)
            await asyncio.sleep(1.0)  # what connecting has left to do
            cpu_s = -backend_cpu(others) - time.thread_time()
            await asyncio.sleep(idle_s)
            cpu_s += backend_cpu(others) + time.thread_time()
            await asyncio.gather(*(_tell(guest) for guest in guests))
            for vbd in itertools.chain.from_iterable(vbds):
                await detach(store, vbd)
            await asyncio.gather(*(guest.wait() for guest in guests))
    return {
        "attach to first I/O, alone, ms": first * 1000,
        "attached and read from, all, s": attached,
        "memory of the daemon for each, KiB": used / 1024,
        "CPU of the daemon while all idle, ms/s": cpu_s / idle_s * 1000,
    }


async def _come_and_go(store: XenstoreClient, machine: Machine) -> float:
    """Seconds from the toolstack's first word to the first answer of a disk in this process."""
    guest = await machine.xenstore()
    begun = time.monotonic()
    vbd = await attach(store, Domid(1), XlDisk(target="null:64M", vdev="xvda"))
    disk = await Disk.open(machine, guest, f"device/vbd/{vbd.vdev}", settings=SETTINGS)
    await disk.read(0, 4096)
    passed = time.monotonic() - begun
    await disk.close()
    await detach(store, vbd)
    await guest.close()
    return passed


def _vdev(number: int) -> str:
    """Names beyond xvdzz are numbers: the extended scheme, bit 28 and 256 to a disk."""
    return str(1 << 28 | number << 8)


async def _attach(store: XenstoreClient, domid: Domid, count: int) -> list[Vbd]:
    return [
        await attach(store, domid, XlDisk(target="null:64M", vdev=_vdev(n))) for n in range(count)
    ]


async def _start(directory: str, domid: int, count: int) -> asyncio.subprocess.Process:
    guest = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "xvd.bench.disks", directory, str(domid),
        *(_vdev(number) for number in range(count)), stdin=-1, stdout=-1,
    )  # fmt: skip
    assert guest.stdout is not None
    await guest.stdout.readline()
    return guest


async def _tell(guest: asyncio.subprocess.Process) -> None:
    """Let it take the next step, and wait until it says that it has."""
    assert guest.stdin is not None
    assert guest.stdout is not None
    guest.stdin.write(b"go\n")
    if not await guest.stdout.readline():
        raise PeerClosed("a guest of the benchmark ended before it was done")


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


async def _guest(directory: str, domid: int, vdevs: Sequence[str]) -> None:
    machine = connect(Path(directory), Domid(domid))
    store = await machine.xenstore()
    await _said("ready")
    opened = await asyncio.gather(
        *(Disk.open(machine, store, f"device/vbd/{v}", settings=SETTINGS) for v in vdevs)
    )
    for disk in opened:
        await disk.read(0, 4096)
    await _said("connected")
    for disk in opened:
        await disk.close()
    sys.stdout.write("closed\n")
    sys.stdout.flush()
    await store.close()
    machine.close()


async def _said(word: str) -> None:
    """Say it, and wait to be told to go on."""
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)


if __name__ == "__main__":
    asyncio.run(_guest(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
    os._exit(0)  # nothing is left to be given back, and the interpreter's end costs the others time
