# SPDX-License-Identifier: Apache-2.0
"""docs/benchmarks.md: the reports of one run as a page with pictures.

What the pictures show is kept beside them, so that they can be drawn anew without a measurement.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from xvd.bench.plot import draw
from xvd.bench.report import Plot, Report, as_markdown, machine

_HEAD = """# Benchmarks

This page says how fast xvd was on one machine, beside what it can be compared with, and what that
does not show. `make bench` measures all of it and writes the page. Absolute figures hold for the
machine below on that day. On another machine only the ratios mean anything.

| | |
|---|---|
{facts}

**Method.** The cases of an experiment are measured one by one, in {rounds} rounds; a figure is
the median over the rounds, a ratio the median of the rounds' ratios. Both ends of the ring are
native threads of one process unless said otherwise; times are of the monotonic clock between the
first operation and the last, CPU times are the threads' own. The checksum of what was read is
compared between rounds, and what is verified is said. "Seen here" is written by hand, of the run
that the page has unless it says otherwise, and kept beside the plots.

**What they do not say.** The guests are emulated: there is no hypervisor in these figures, and no
cost of its calls; real Xen, in software emulation, is at the end of the page. The machine is
shared and has {cpus} CPUs, so that two threads that never sleep take all of it. fio, where it
measures beside us, takes one.
"""


LAST = "xen.md"
"""What was measured on real Xen, by another command: words, and `TABLES` between them."""
TABLES = "<!-- the tables of xen-*.md -->\n"
DATA: Final = "plots.json"
"""What the pictures of the folder show: each plot with its title, by the experiment's name."""


def write(reports: Sequence[Report], path: Path, *, rounds: int) -> None:
    """Write the page, and each plot as an SVG into a folder of the page's name beside it.

    What the folder has to say of an experiment, in NAME.md, becomes its "Seen here"; the page ends
    as `end` says.
    """
    pictures = path.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    facts = machine()
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    parts = [_HEAD.format(facts=table, rounds=rounds, cpus=facts["cpus"])]
    for report in reports:
        picture = ""
        if report.plot is not None:
            draw(report, pictures / f"{report.name}.svg")
            picture = f"{pictures.name}/{report.name}.svg"
        remark = pictures / f"{report.name}.md"
        seen = remark.read_text().strip() if remark.exists() else ""
        parts.append(as_markdown(report, picture, seen))
    path.write_text("\n".join(parts) + end(pictures))
    _keep(reports, pictures / DATA)


def _keep(reports: Sequence[Report], path: Path) -> None:
    plots = [
        f" {json.dumps(report.name)}: "
        + json.dumps({"title": report.title, **dataclasses.asdict(report.plot)})
        for report in reports
        if report.plot is not None
    ]
    path.write_text("{\n" + ",\n".join(plots) + "\n}\n")


def kept(pictures: Path) -> list[Report]:
    """Return what a folder's pictures show, as reports without tables."""
    return [
        Report(name, found.pop("title"), "", [], Plot(**found))
        for name, found in json.loads((pictures / DATA).read_text()).items()
    ]


def redraw(pictures: Path) -> None:
    """Draw a folder's pictures anew, of what was kept of the last run."""
    for report in kept(pictures):
        draw(report, pictures / f"{report.name}.svg")


def end(pictures: Path) -> str:
    """The part on real Xen, of what the folder has."""
    last = pictures / LAST
    if not last.exists():
        return ""
    tables = "\n".join(each.read_text() for each in sorted(pictures.glob("xen-*.md")))
    return "\n" + last.read_text().replace(TABLES, tables)


def write_end(path: Path) -> None:
    """Write the page's part on real Xen anew, and leave the rest."""
    found = end(path.with_suffix(""))
    heading = found.lstrip().partition("\n")[0]
    before, _, _ = path.read_text().partition(f"\n{heading}\n")
    path.write_text(before + found)
