# SPDX-License-Identifier: Apache-2.0
"""How long a guest waits when the process that serves it is killed, or goes on as another version.

Users of two guests write and read back, and check what they read. A wait is the longest time
without an answer around that.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from xvd.bench.daemons import Daemons, daemons
from xvd.bench.report import Cell, Plot, Report, Table
from xvd.bench.run import Run
from xvd.frontend.disk import Disk
from xvd.machine.emulated.service import connect
from xvd.types import Domid

KILLED, OTHER = Domid(1), Domid(2)
USERS: Final = 4
BLOCK: Final = 4096
APART_S: Final = 0.6
"""From one kill to the next: all is at work again, and a supervisor has no reason to slow down."""
FRESH_S: Final = 0.02
"""Answers come again when the last one is no older than this, some time after the kill."""

_DRAWN: Final = (10, 25, 50, 75, 90, 100)
"""Per cent of the kills of which the plot has a point."""


@dataclass(frozen=True, slots=True)
class _Way:
    """How another process comes to serve a guest. options: the backend's. part: of the kills.
    spares: whether the other guest keeps its own."""

    options: tuple[str, ...]
    exchange: Callable[[Daemons], None]
    part: float = 1.0
    spares: bool = False


def _kill(backend: Daemons) -> None:
    """Kill the first guest's process: the supervisor lets another take over."""
    while (worker := backend.worker(KILLED)) is None:
        pass
    os.kill(worker, signal.SIGKILL)


_EACH: Final = ("--isolation", "guest")
WAYS: Final = {
    "killed, own process": _Way(_EACH, _kill, spares=True),
    "killed, one for all": _Way((), Daemons.start_anew),
    "restarted, own process": _Way(_EACH, partial(Daemons.start_anew, number=signal.SIGTERM), 0.25),
    "upgraded, own process": _Way(_EACH, Daemons.hand_over, 0.25),
    "upgraded, one for all": _Way((), Daemons.hand_over, 0.25),
}


def takeover(run: Run) -> Report:
    """Exchange the process that serves a guest, in each way, again and again."""
    kills = max(5, round(100 * run.scale))
    picked = {"median": 0.5, "90 %": 0.9, "99 %": 0.99}
    rows: list[tuple[Cell, ...]] = []
    lines: dict[str, list[tuple[Cell, float]]] = {}
    typical: dict[str, float] = {}
    for mode, way in WAYS.items():
        found = asyncio.run(_waits(way, max(5, round(kills * way.part)), run.disk))
        run.tick("takeover")
        for name, unsorted in found.items():
            waits = [1e3 * wait for wait in sorted(unsorted)]
            figures = [waits[int(part * (len(waits) - 1))] for part in picked.values()]
            label = f"{mode}: {name}" if name else mode
            typical[f"{label}: median wait, ms"] = figures[0]
            rows.append((label, *figures, waits[-1]))
            if not name:
                lines[mode] = [(part, waits[part * (len(waits) - 1) // 100]) for part in _DRAWN]
    return Report(
        "takeover",
        "A backend that is killed",
        f"{USERS} users of each of two guests write {BLOCK} bytes each and read them back, from a "
        f"file, while the process that serves the first guest is killed by SIGKILL {kills} times; "
        "a wait is the longest time without an answer around a kill, and between two kills. Where "
        "a guest has a process of its own, its supervisor lets another take over; where one serves "
        "all, the daemon is started anew at once, as a service manager does. Restarted: it is "
        "asked to end, and started anew. Upgraded: it is reloaded after an upgrade, which lets "
        "another version of the program go on. Nothing was lost, and no error was seen.",
        [Table(("wait, ms", *picked, "longest"), rows)],
        Plot("% of exchanges", "wait at most, ms", lines, log=True),
        ratios=typical,
    )


async def _waits(way: _Way, times: int, place: Path) -> dict[str, list[float]]:
    """Seconds that users waited for an answer, of the guest whose process was exchanged (no name),
    and of the other."""
    with daemons(*way.options, place=place) as backend:
        async with contextlib.AsyncExitStack() as stack:
            killed, other = [
                _Users(await _disk_of(backend, domid, stack)) for domid in (KILLED, OTHER)
            ]
            found = await _exchange_under_load(killed, other, partial(way.exchange, backend), times)
            await killed.end()
            await other.end()
    return found if way.spares else {"": found[""]}


async def _disk_of(backend: Daemons, domid: Domid, stack: contextlib.AsyncExitStack) -> Disk:
    image = backend.image(f"{domid}.img", USERS * BLOCK)
    path = await backend.attach(domid, image)
    machine = connect(backend.host, domid)
    stack.callback(machine.close)
    store = await stack.enter_async_context(await machine.xenstore())
    return await stack.enter_async_context(await Disk.open(machine, store, path))


class _Users:
    """Of a disk. answered: when the last answer came. longest: without one, since that was set to
    0; seconds."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._over = False
        self.answered, self.longest = time.monotonic(), 0.0
        self.all = asyncio.gather(*map(self._use, range(USERS)))

    async def _use(self, number: int) -> None:
        turn = 0
        while not self._over:
            data = b"%d %d " % (number, turn := turn + 1)
            data = data.ljust(BLOCK, b".")
            await self._disk.write(number * BLOCK, data)
            self.longest = max(self.longest, time.monotonic() - self.answered)
            self.answered = time.monotonic()
            if await self._disk.read(number * BLOCK, BLOCK) != data:
                raise AssertionError("what was written is not what is read")

    async def end(self) -> None:
        self._over = True
        await self.all


async def _exchange_under_load(
    killed: _Users, other: _Users, exchange: Callable[[], None], times: int
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"": [], "another guest": [], "another, between kills": []}
    for _ in range(times):
        other.longest = 0.0
        await asyncio.wait([killed.all], timeout=APART_S)
        found["another, between kills"].append(other.longest)
        killed.longest = other.longest = 0.0
        await asyncio.to_thread(exchange)
        await asyncio.wait([killed.all], timeout=APART_S / 3)
        while time.monotonic() - killed.answered > FRESH_S and not killed.all.done():
            await asyncio.wait([killed.all], timeout=FRESH_S / 4)
        found[""].append(killed.longest)
        found["another guest"].append(other.longest)
    return found
