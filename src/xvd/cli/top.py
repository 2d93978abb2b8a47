# SPDX-License-Identifier: Apache-2.0
"""``xvd top``: what every disk does now, refreshed until interrupted."""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from xvd.backend.counters import BackCounters
from xvd.cli import common, output, running
from xvd.cli.daemons import ALIVE, Answer, ask_all
from xvd.errors import PeerClosed
from xvd.types import RING_SECTOR_SIZE
from xvd.xenbus.counters import percentile

_COLUMNS: Final = (
    ("rd/s", "reads", "8.0f"), ("wr/s", "writes", "8.0f"),
    ("rd MB/s", "read_mb", "8.1f"), ("wr MB/s", "write_mb", "8.1f"),
    ("p99 us", "p99_us", "8.0f"), ("p50 us", "p50_us", "8.0f"), ("busy", "in_flight", "5d"),
    ("errors/s", "errors", "9.0f"), ("refused/s", "refused", "10.0f"),
    ("kept %", "kept_percent", "7.0f"),
)  # fmt: skip
"""Head, field and format of each column, the most important first: a narrow screen shows those."""
_DISK: Final = "{:<10} {:<5}"
_GONE: Final = "gone"
_BACKENDS: Final = "backend-*"


@dataclass(frozen=True, slots=True)
class Rates:
    """What one disk did between two polls.

    Rates are for a second, latencies in microseconds over reads and writes; `kept_percent`: of the
    grants that were used, how many were mapped already.
    """

    disk: str
    reads: float
    writes: float
    read_mb: float
    write_mb: float
    p50_us: float
    p99_us: float
    in_flight: int
    kept_percent: float
    refused: float
    errors: float


def rates(before: dict[str, Any], after: dict[str, Any], seconds: float) -> Rates:
    """Compute rates from two of a disk's figures; a disk that is new has done it all since."""
    a, b = (BackCounters.of(side.get("counters", {})) for side in (before, after))

    def rate(old: int, new: int) -> float:
        return max(0, new - old) / seconds

    latency = [0] * 40
    for kind in ("read", "write"):
        new, old = (side.latency.get(kind, [0] * 40) for side in (b, a))
        latency = [seen + n - o for seen, n, o in zip(latency, new, old, strict=True)]
    hits = rate(a.persistent_hits, b.persistent_hits)
    misses = rate(a.persistent_misses, b.persistent_misses)
    return Rates(
        disk=after["disk"],
        reads=rate(a.rd_req, b.rd_req),
        writes=rate(a.wr_req, b.wr_req),
        read_mb=rate(a.rd_sect, b.rd_sect) * RING_SECTOR_SIZE / 1e6,
        write_mb=rate(a.wr_sect, b.wr_sect) * RING_SECTOR_SIZE / 1e6,
        p50_us=percentile(latency, 50) / 1000,
        p99_us=percentile(latency, 99) / 1000,
        in_flight=b.in_flight,
        kept_percent=100 * hits / (hits + misses) if hits + misses else 0.0,
        refused=rate(sum(a.refusals.values()), sum(b.refusals.values())),
        errors=rate(a.storage_errors, b.storage_errors),
    )


@dataclass(frozen=True, slots=True)
class Poll:
    """The figures of every disk by its directory, and how its daemon was at that time.

    A daemon that does not live has the disks that it had when it did.
    """

    at: float
    disks: dict[str, dict[str, Any]]
    states: dict[str, str]

    @property
    def status(self) -> int:
        """The exit status that this makes: 1 if something is not served."""
        return 1 if any(state != ALIVE for state in self.states.values()) else 0


def polled(before: Poll | None, answers: list[Answer], at: float) -> Poll:
    """Merge these answers in: of the dead, what was known before."""
    disks: dict[str, dict[str, Any]] = dict(before.disks) if before else {}
    states = dict.fromkeys(disks, _GONE)
    for answer in answers:
        had = [path for path, disk in disks.items() if disk["daemon"] == answer.daemon]
        if answer.state == ALIVE:
            for path in had:
                del disks[path], states[path]
            new = {it["path"]: it | {"daemon": answer.daemon} for it in answer.result}
            disks |= new
            states |= dict.fromkeys(new, ALIVE)
        elif had:
            states |= dict.fromkeys(had, answer.state)
        else:
            states[answer.daemon] = answer.state
    return Poll(at, disks, states)


def rows_between(before: Poll, after: Poll) -> list[tuple[str, Rates | None]]:
    """(state, rates) of each disk; None for a daemon of which no disk is known."""
    seconds = after.at - before.at
    rows: list[tuple[str, Rates | None]] = []
    for name, state in after.states.items():
        disk = after.disks.get(name)
        row = rates(before.disks.get(name, {}), disk, seconds) if disk else None
        rows.append((state, row))
    return rows


def lines_of(rows: list[tuple[str, Rates | None]], width: int) -> list[str]:
    """A table of as many columns as the width has room for."""
    shown, used = [], len(_DISK.format("", ""))
    for head, name, form in _COLUMNS:
        used += int(form.partition(".")[0].rstrip("d"))
        if used <= width:
            shown.append((head, name, form))
    heads = "".join(f"{head:>{form.partition('.')[0].rstrip('d')}}" for head, _, form in shown)
    lines = [_DISK.format("disk", "state") + heads]
    for state, row in rows:
        figures = "".join(format(getattr(row, name), form) for _, name, form in shown if row)
        lines.append((_DISK.format(row.disk if row else "-", state) + figures).rstrip())
    return lines


def top(
    interval: Annotated[
        float, typer.Option("--interval", min=0.05, help="Seconds between two polls.")
    ] = 1.0,
    count: Annotated[
        int, typer.Option("--count", min=0, help="How many times; 0 until interrupted.")
    ] = 0,
    host: common.HostDir = common.DEFAULT_HOST,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON document a line.")] = False,
) -> int:
    """Show what every disk does: rates, latencies, how well persistent grants serve.

    Off a terminal each poll is some lines of text. A backend that dies is shown as dead, and its
    successor when it comes; the status is 1 if one was missing at the last poll.
    """
    return running.run(_top(host, interval, count, json))


async def _polls(host: Path, interval: float, count: int) -> AsyncIterator[tuple[Poll, Poll]]:
    """Yield each poll with the one before it, until there were so many or a signal came."""
    stop = running.Stop(running.GRACE_S)
    before = polled(None, await ask_all(host, _BACKENDS, "stats"), time.monotonic())
    shown = 0
    while count == 0 or shown < count:
        if await stop.wait_or(asyncio.sleep(interval)):
            return
        try:
            answers = await ask_all(host, _BACKENDS, "stats")
        except PeerClosed:
            answers = []  # all of them have ended; another one may come
        after = polled(before, answers, time.monotonic())
        yield before, after
        before = after
        shown += 1


async def _top(host: Path, interval: float, count: int, json: bool) -> int:
    console = Console(file=sys.stdout)
    wide = 1000 if "COLUMNS" not in os.environ else console.width
    status = 0
    with contextlib.ExitStack() as stack:
        live = None
        if console.is_terminal and not json:
            live = stack.enter_context(Live(console=console, auto_refresh=False, screen=True))
        async for before, after in _polls(host, interval, count):
            status = after.status
            rows = rows_between(before, after)
            if json:
                disks = [{"state": state, **(asdict(row) if row else {})} for state, row in rows]
                output.print_json({"seconds": after.at - before.at, "disks": disks}, indent=0)
            elif live is not None:
                live.update(Text("\n".join(lines_of(rows, console.width))), refresh=True)
            else:
                output.tell("\n".join(lines_of(rows, wide)) + "\n")
    return status
