# SPDX-License-Identifier: Apache-2.0
"""How long a guest waits when the process that serves it is killed.

Four users write and read back, and check what they read. A wait is the longest time without an
answer around a kill.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from xvd.bench.report import Cell, Plot, Report, Table
from xvd.bench.run import Run
from xvd.frontend.disk import Disk
from xvd.machine.emulated.link import LinkClient
from xvd.machine.emulated.service import connect
from xvd.toolstack.vbd import attach, create_guest
from xvd.toolstack.xldisk import parse_xl_disk
from xvd.types import DOM0, Domid

GUEST: Final = Domid(1)
USERS: Final = 4
BLOCK: Final = 4096
APART_S: Final = 0.3
"""From one kill to the next, so that all is at work again."""
FRESH_S: Final = 0.02
"""Answers come again when the last one is no older than this, some time after the kill."""

_DRAWN: Final = (10, 25, 50, 75, 90, 100)
"""Per cent of the kills of which the plot has a point."""

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
        lines[mode] = [(part, waits[part * (len(waits) - 1) // 100] * 1e3) for part in _DRAWN]
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


class _Backend:
    """A host and its backend, in processes of their own, under a directory."""

    def __init__(self, directory: Path, options: tuple[str, ...]) -> None:
        self.directory = directory
        self._guest = bool(options)
        self._words = ("backend", "--host", str(directory), *options)
        self._host = _start("host", str(directory))
        self._process = _start(*self._words)

    def kill(self) -> None:
        """Kill what serves the guest; where that is all, start it anew."""
        if self._guest:
            os.kill(self._worker(), signal.SIGKILL)
            return
        self._process.kill()
        self._process.wait()
        self._process = _start(*self._words, wait=False)

    def _worker(self) -> int:
        """Ask the supervisor for the guest's process."""
        while True:
            with socket.socket(socket.AF_UNIX) as control:
                control.connect(str(self.directory / f"control/backend-{DOM0}"))
                control.sendall(b'{"method": "workers", "id": 1}\n')
                with control.makefile("rb") as answer:
                    [worker] = msgspec.json.decode(answer.readline())["result"]
            if worker["pid"] is not None:
                return int(worker["pid"])

    def close(self) -> None:
        """End both."""
        for process in (self._process, self._host):
            process.terminate()
            process.wait()


def _start(*words: str, wait: bool = True) -> "subprocess.Popen[bytes]":
    """Start a daemon; return when it says that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "xvd.cli", *words],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    if wait:
        process.stdout.readline()
    return process


@contextlib.contextmanager
def _backend(options: tuple[str, ...], place: Path) -> Iterator[tuple[_Backend, Path]]:
    with tempfile.TemporaryDirectory(prefix="xvd-", dir=place) as directory:
        image = Path(directory, "disk.img")
        image.touch()
        os.truncate(image, USERS * BLOCK)
        backend = _Backend(Path(directory, "host"), options)
        try:
            yield backend, image
        finally:
            backend.close()


async def _waits(options: tuple[str, ...], kills: int, place: Path) -> list[float]:
    """Seconds that the users waited for an answer, at each kill."""
    with _backend(options, place) as (backend, image):
        dom0 = connect(backend.directory, DOM0)
        async with await dom0.xenstore() as store:
            assert isinstance(dom0.calls, LinkClient)
            dom0.calls.create_domain(GUEST)
            await create_guest(store, GUEST, "guest")
            vbd = await attach(store, GUEST, parse_xl_disk(f"vdev=xvda,target={image}"))
        machine = connect(backend.directory, GUEST)
        async with await machine.xenstore() as its_store:
            async with await Disk.open(machine, its_store, f"device/vbd/{vbd.vdev}") as disk:
                found = await _kill_under_load(disk, backend, kills)
        machine.close()
        dom0.close()
    return found


async def _kill_under_load(disk: Disk, backend: _Backend, kills: int) -> list[float]:
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
        await asyncio.to_thread(backend.kill)
        await asyncio.wait([users], timeout=APART_S / 3)
        while time.monotonic() - answered > FRESH_S and not users.done():
            await asyncio.wait([users], timeout=FRESH_S / 4)
        found.append(longest)
    over = True
    await users
    return found
