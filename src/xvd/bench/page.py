# SPDX-License-Identifier: Apache-2.0
"""docs/benchmarks.md: the reports of one run as a page with pictures.

What the pictures show is kept beside them, so that they can be drawn anew without a measurement.
What a run has not measured stays as the page has it, with a line that says of which run it is.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
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


_SECTION: Final = re.compile(r"^## .*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
_EXPERIMENT: Final = re.compile(r"^`xvd bench ([\w-]+)`\.", re.MULTILINE)
_FACT: Final = re.compile(r"^\| (\w+) \| (.+) \|$", re.MULTILINE)
_EARLIER: Final = "*Of an earlier run"


def write(reports: Sequence[Report], path: Path, *, rounds: int, order: Sequence[str] = ()) -> None:
    """Write the page, and each plot as an SVG into a folder of the page's name beside it.

    What the folder has to say of an experiment, in NAME.md, becomes its "Seen here"; the page ends
    as `end` says. order: the experiments' names, as their sections follow; those that the page has
    already and that are not among the reports stay, as of an earlier run. Without it none does.
    """
    pictures = path.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    measured = {report.name: _section(report, pictures) for report in reports}
    facts = machine()
    before = _sections(path, _in_words(facts)) if order else {}
    names = [name for name in (*order, *measured) if name in measured or name in before]
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    head = _HEAD.format(facts=table, rounds=rounds, cpus=facts["cpus"])
    sections = [measured.get(name) or before[name] for name in dict.fromkeys(names)]
    path.write_text("\n".join([head, *sections]) + end(pictures))
    _keep(reports, pictures / DATA, set(before), order)


def _section(report: Report, pictures: Path) -> str:
    picture = ""
    if report.plot is not None:
        draw(report, pictures / f"{report.name}.svg")
        picture = f"{pictures.name}/{report.name}.svg"
    remark = pictures / f"{report.name}.md"
    seen = remark.read_text().strip() if remark.exists() else ""
    return as_markdown(report, picture, seen)


def _sections(path: Path, now: str) -> dict[str, str]:
    """The sections of experiments that a page has, each with a line that says of which run it is,
    unless that was as this one: now, in words."""
    text = path.read_text() if path.exists() else ""
    told = _in_words(dict(_FACT.findall(text.partition("\n## ")[0])))
    found = {}
    for section in _SECTION.findall(text):
        if named := _EXPERIMENT.search(section):
            heading, _, rest = (section.rstrip("\n") + "\n").partition("\n")
            line = "" if _EARLIER in section or told == now else f"\n{_EARLIER}: {told}.*\n"
            found[named[1]] = f"{heading}\n{line}{rest}"
    return found


def _in_words(facts: Mapping[str, object]) -> str:
    """The run by its facts: when, on what, and of what."""
    found = ", ".join(str(facts[name]) for name in ("date", "cpu", "kernel") if name in facts)
    return f"{found}, commit {facts.get('commit', 'unknown')}"


def _keep(reports: Sequence[Report], path: Path, before: set[str], order: Sequence[str]) -> None:
    found = json.loads(path.read_text()) if path.exists() else {}
    plots = {name: plot for name, plot in found.items() if name in before}
    for report in reports:
        if report.plot is not None:
            plots[report.name] = {"title": report.title, **dataclasses.asdict(report.plot)}
    names = [name for name in dict.fromkeys((*order, *plots)) if name in plots]
    lines = [f" {json.dumps(name)}: {json.dumps(plots[name])}" for name in names]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


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
