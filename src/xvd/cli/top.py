# SPDX-License-Identifier: Apache-2.0
"""``xvd top``: what every disk does now, refreshed until interrupted."""

import asyncio
import contextlib
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import typer

from xvd.cli import common, output, running
from xvd.cli.daemons import ask_all
from xvd.cli.guests import guest_names
from xvd.cli.rates import Poll, Rates, polled, queues_between, rows_between
from xvd.errors import PeerClosed, XvdError

_COLUMNS: Final = (
    ("rd/s", "reads", "8.0f"), ("wr/s", "writes", "8.0f"),
    ("rd MB/s", "read_mb", "8.1f"), ("wr MB/s", "write_mb", "8.1f"),
    ("p99 us", "p99_us", "8.0f"), ("p50 us", "p50_us", "8.0f"), ("busy", "in_flight", "5d"),
    ("errors/s", "errors", "9.0f"), ("refused/s", "refused", "10.0f"),
    ("kept %", "kept_percent", "7.0f"),
)  # fmt: skip
"""Head, field and format of each column, the most important first: a narrow screen shows those."""
_DISK: Final = "{:<10} {:<5}"
_BACKENDS: Final = "backend-*"
_MORE: Final = "\nInstall xvd[top] (textual) for guests, queues, latencies, sorting and filtering."


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

    On a terminal it fills the screen (with textual, the extra xvd[top]): disks, guests, queues and
    a heat map of latencies, by the keys at its foot. Off a terminal each poll is some lines of
    text. A backend that dies is shown as dead, and its successor when it comes; the status is 1 if
    one was missing at the last poll.
    """
    return running.run(_top(host, interval, count, json))


async def _polls(
    host: Path, interval: float, count: int, *, naming: bool = False
) -> AsyncIterator[tuple[Poll, Poll]]:
    """Yield each poll with the one before it, until there were so many or a signal came.

    naming: ask the store what guests are called, whenever there are others than before.
    """
    stop = running.Stop(running.GRACE_S)
    before = polled(None, await ask_all(host, _BACKENDS, "stats"), time.monotonic())
    shown, named = 0, None
    names: dict[str, str] = {}
    while count == 0 or shown < count:
        if await stop.wait_or(asyncio.sleep(interval)):
            return
        try:
            answers = await ask_all(host, _BACKENDS, "stats")
        except PeerClosed:
            answers = []  # all of them have ended; another one may come
        after = polled(before, answers, time.monotonic(), names)
        if naming and after.guests.keys() != named:
            named = after.guests.keys()
            with contextlib.suppress(XvdError, OSError, TimeoutError):
                names |= await guest_names(host, named)
        yield before, after
        before = after
        shown += 1


async def _top(host: Path, interval: float, count: int, json: bool) -> int:
    if json or not sys.stdout.isatty():
        wide = shutil.get_terminal_size().columns if "COLUMNS" in os.environ else 1000
        return await _print(_polls(host, interval, count), wide, json)
    try:
        from xvd.cli.topscreen import TopScreen
    except ImportError:
        return await _refresh(_polls(host, interval, count))
    polls = _polls(host, interval, count, naming=True)
    return await TopScreen(polls, f"{host}, every {interval:g} s").show()


async def _print(polls: AsyncIterator[tuple[Poll, Poll]], width: int, json: bool) -> int:
    status = 0
    async for before, after in polls:
        status = after.status
        if json:
            output.print_json(_document(before, after), indent=0)
        else:
            output.tell("\n".join(lines_of(rows_between(before, after), width)) + "\n")
    return status


def _document(before: Poll, after: Poll) -> dict[str, object]:
    """Return one poll as `--json` prints it."""
    queues: dict[str, list[dict[str, object]]] = {}
    for path, number, row in queues_between(before, after):
        queues.setdefault(path, []).append({**asdict(row), "queue": number})
    rows = zip(after.states, rows_between(before, after), strict=True)
    return {
        "seconds": after.at - before.at,
        "disks": [
            {"state": state, **(asdict(row) | {"queues": queues.get(path, [])} if row else {})}
            for path, (state, row) in rows
        ],
    }


async def _refresh(polls: AsyncIterator[tuple[Poll, Poll]]) -> int:
    """Show the table alone, where there is no textual."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()
    status = 0
    with Live(console=console, auto_refresh=False, screen=True) as live:
        async for before, after in polls:
            status = after.status
            lines = lines_of(rows_between(before, after), console.width)
            live.update(Text("\n".join(lines) + "\n" + _MORE), refresh=True)
    return status
