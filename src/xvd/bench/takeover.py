# SPDX-License-Identifier: Apache-2.0
"""How long a guest waits when the process that serves it is killed.

Four users write and read back, and check what they read. A wait is the longest time without an
answer around a kill.
"""

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Final

from xvd.bench.daemons import Daemons, daemons
from xvd.bench.report import Cell, Plot, Report, Table
from xvd.bench.run import Run
from xvd.frontend.disk import Disk
from xvd.machine.emulated.service import connect
from xvd.types import Domid

GUEST: Final = Domid(1)
USERS: Final = 4
BLOCK: Final = 4096
APART_S: Final = 0.6
"""From one kill to the next: all is at work again, and a supervisor has no reason to slow down."""
FRESH_S: Final = 0.02
"""Answers come again when the last one is no older than this, some time after the kill."""

MODES: Final = {
    "a process for each guest": ("--isolation", "guest"),
    "one process, started anew": (),
}


def takeover(run: Run) -> Report:
    """Kill the process that serves a guest, in either mode, again and again."""
    kills = max(5, round(100 * run.scale))
    rows: list[tuple[Cell, ...]] = []
    lines: dict[str, list[tuple[Cell, float]]] = {}
    typical: dict[str, float] = {}
    for mode, options in MODES.items():
        waits = sorted(asyncio.run(_waits(options, kills, run.disk)))
        run.tick("takeover")
        picked = {"median": 0.5, "90 %": 0.9, "99 %": 0.99}
        figures = [waits[int(part * (len(waits) - 1))] * 1e3 for part in picked.values()]
        typical[f"{mode}: median wait, ms"] = figures[0]
        rows.append((mode, *figures, waits[-1] * 1e3))
        lines[mode] = [(100 * n / len(waits), wait * 1e3) for n, wait in enumerate(waits, 1)]
    return Report(
        "takeover",
        "A backend that is killed",
        f"{USERS} users write {BLOCK} bytes each and read them back, from a file, while the "
        f"process that serves them is killed by SIGKILL {kills} times. Where guests have processes "
        "of their own, their supervisor lets another take over; otherwise the daemon is started "
        "anew at once, as a service manager does. Nothing was lost, and no error was seen.",
        [Table(("wait, ms", *picked, "longest"), rows)],
        Plot("% of kills", "wait at most, ms", lines, log=True),
        ratios=typical,
    )


def _kill(backend: Daemons) -> None:
    """Kill what serves the guest; where that is all, start it anew."""
    if not backend.options:
        backend.start_anew()
        return
    while True:
        [worker] = backend.workers()
        if worker is not None:
            os.kill(worker, signal.SIGKILL)
            return


async def _waits(options: tuple[str, ...], kills: int, place: Path) -> list[float]:
    """Seconds that the users waited for an answer, at each kill."""
    with daemons(*options, place=place) as backend:
        image = backend.image("disk.img", USERS * BLOCK)
        path = await backend.attach(GUEST, image)
        machine = connect(backend.host, GUEST)
        async with await machine.xenstore() as its_store:
            async with await Disk.open(machine, its_store, path) as disk:
                found = await _kill_under_load(disk, backend, kills)
        machine.close()
    return found


async def _kill_under_load(disk: Disk, backend: Daemons, kills: int) -> list[float]:
    answered, longest, over = time.monotonic(), 0.0, False

    async def use(number: int) -> None:
        nonlocal answered, longest
        turn = 0
        while not over:
            data = b"%d %d " % (number, turn := turn + 1)
            data = data.ljust(BLOCK, b".")
            await disk.write(number * BLOCK, data)
            longest, answered = max(longest, time.monotonic() - answered), time.monotonic()
            if await disk.read(number * BLOCK, BLOCK) != data:
                raise AssertionError("what was written is not what is read")

    users = asyncio.gather(*map(use, range(USERS)))
    found = []
    for _ in range(kills):
        await asyncio.wait([users], timeout=APART_S)
        longest = 0.0
        await asyncio.to_thread(_kill, backend)
        await asyncio.wait([users], timeout=APART_S / 3)
        while time.monotonic() - answered > FRESH_S and not users.done():
            await asyncio.wait([users], timeout=FRESH_S / 4)
        found.append(longest)
    over = True
    await users
    return found
