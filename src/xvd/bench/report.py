# SPDX-License-Identifier: Apache-2.0
"""What an experiment has to say: text, tables and a plot, for a terminal, a page, or JSON."""

import datetime
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Cell = str | float


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under columns; numbers are shown with three significant digits or as whole ones."""

    columns: tuple[str, ...]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True, slots=True)
class Plot:
    """Lines over numbers, or bars over names. lines: label: [(x, y), ...]."""

    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[Cell, float]]]
    log: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """One experiment's result.

    method: what was done. published: what others have measured, and where; empty if nobody has.
    """

    name: str
    title: str
    method: str
    tables: Sequence[Table]
    plot: Plot | None = None
    published: str = ""
    ratios: Mapping[str, float] = field(default_factory=dict)


def show(cell: Cell) -> str:
    """A cell in words."""
    if isinstance(cell, str):
        return cell
    if cell == round(cell) or abs(cell) >= 1000:
        return f"{cell:,.0f}"
    return f"{cell:.3g}"


def as_text(report: Report) -> str:
    """For a terminal."""
    lines = [f"{report.name}: {report.title}", ""]
    for table in report.tables:
        cells = [list(table.columns)] + [[show(cell) for cell in row] for row in table.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(table.columns))]
        for row in cells:
            first = row[0].ljust(widths[0])
            rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
            lines.append("  ".join((first, *rest)).rstrip())
        lines.append("")
    return "\n".join(lines)


def as_markdown(report: Report, plot: str = "", seen: str = "") -> str:
    """For docs/benchmarks.md; plot: the picture's path from there; seen: what is seen here, and
    why it differs from what was published.
    """
    parts = [f"## {report.title}", f"`xvd bench {report.name}`. {report.method}"]
    for table in report.tables:
        rule = "|".join(["---"] + ["--:"] * (len(table.columns) - 1))
        rows = ["| " + " | ".join(show(cell) for cell in row) + " |" for row in table.rows]
        parts.append("\n".join([f"| {' | '.join(table.columns)} |", f"|{rule}|", *rows]))
    if plot:
        parts.append(f"![{report.title}]({plot})")
    if report.published:
        parts.append(f"**Published.** {report.published}")
    if seen:
        parts.append(f"**Seen here.** {seen}")
    return "\n\n".join(parts) + "\n"


def as_json(report: Report) -> dict[str, Any]:
    """For programs."""
    return {
        "experiment": report.name,
        "title": report.title,
        "tables": [
            [dict(zip(table.columns, row, strict=True)) for row in table.rows]
            for table in report.tables
        ],
        "ratios": dict(report.ratios),
    }


def machine() -> dict[str, object]:
    """Where and when, and of what."""
    model = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "date": datetime.date.today().isoformat(),
        "cpus": os.cpu_count(),
        "cpu": model[0] if model else platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": commit(),
    }


def commit() -> str:
    """Name the commit that is measured; "-dirty" where the sources are not those of it."""
    found = _git("rev-parse", "--short", "HEAD")
    if not found:
        return "unknown"
    return f"{found}-dirty" if _git("status", "--porcelain", "--", ":/src") else found


def _git(*words: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
