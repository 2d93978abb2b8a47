# SPDX-License-Identifier: Apache-2.0
"""``xvd top``: what every disk does now, refreshed until interrupted."""

import asyncio
import contextlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from xvd.cli import common
from xvd.cli.control import ask
from xvd.errors import PeerClosed
from xvd.frontend.statistics import percentile

_HEADS = ("disk", "rd/s", "wr/s", "rd MB/s", "wr MB/s", "p50 us", "p99 us", "busy", "kept %",
          "refused/s", "errors/s")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rates:
    """What one disk did between two looks.

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
    """From two of a disk's figures, `seconds` apart; a disk that is new has done it all since."""
    a, b = before.get("counters", {}), after["counters"]

    def rate(name: str) -> float:
        return float(max(0, b.get(name, 0) - a.get(name, 0)) / seconds)

    latency = [0] * 40
    for kind in ("read", "write"):
        new, old = (side.get("latency", {}).get(kind, [0] * 40) for side in (b, a))
        latency = [seen + n - o for seen, n, o in zip(latency, new, old, strict=True)]
    hits, misses = rate("persistent_hits"), rate("persistent_misses")
    refused = sum(b.get("refusals", {}).values()) - sum(a.get("refusals", {}).values())
    return Rates(
        disk=after["disk"],
        reads=rate("rd_req"),
        writes=rate("wr_req"),
        read_mb=rate("rd_sect") * 512 / 1e6,
        write_mb=rate("wr_sect") * 512 / 1e6,
        p50_us=percentile(latency, 50) / 1000,
        p99_us=percentile(latency, 99) / 1000,
        in_flight=b.get("in_flight", 0),
        kept_percent=100 * hits / (hits + misses) if hits + misses else 0.0,
        refused=max(0, refused) / seconds,
        errors=rate("storage_errors"),
    )


def top(
    interval: Annotated[
        float, typer.Option("--interval", min=0.05, help="Seconds between two looks.")
    ] = 1.0,
    count: Annotated[
        int, typer.Option("--count", min=0, help="How many times; 0 until interrupted.")
    ] = 0,
    host: common.HostDir = common.DEFAULT_HOST,
) -> int:
    """Show what every disk does: rates, latencies, how well persistent grants serve."""
    with contextlib.suppress(KeyboardInterrupt):
        return common.run(_top(host, interval, count))
    return 0


async def _look(host: Path) -> dict[str, dict[str, Any]]:
    """The figures of every disk that a backend serves, by its directory."""
    disks: dict[str, dict[str, Any]] = {}
    answered = False
    for path in sorted((host / "control").glob("backend-*")):
        with contextlib.suppress(PeerClosed):
            disks |= {disk["disk"]: disk for disk in await ask(path, "stats")}
            answered = True
    if not answered:
        raise PeerClosed(f"{host}: no backend answers; start one: xvd backend --host {host}")
    return disks


def _table(rows: list[Rates]) -> Table:
    table = Table(box=None, pad_edge=False)
    for head in _HEADS:
        table.add_column(head, justify="left" if head == "disk" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.disk, f"{row.reads:.0f}", f"{row.writes:.0f}", f"{row.read_mb:.1f}",
            f"{row.write_mb:.1f}", f"{row.p50_us:.0f}", f"{row.p99_us:.0f}", str(row.in_flight),
            f"{row.kept_percent:.0f}", f"{row.refused:.0f}", f"{row.errors:.0f}",
        )  # fmt: skip
    return table


async def _top(host: Path, interval: float, count: int) -> int:
    console = Console(file=sys.stdout)
    before, then = await _look(host), time.monotonic()
    shown = 0
    with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
        while count == 0 or shown < count:
            await asyncio.sleep(interval)
            after, now = await _look(host), time.monotonic()
            rows = [rates(before.get(name, {}), disk, now - then) for name, disk in after.items()]
            live.update(_table(rows), refresh=True)
            before, then = after, now
            shown += 1
    return 0
