# SPDX-License-Identifier: Apache-2.0
"""A report's plot as a picture, by matplotlib (the extra ``bench``).

Only what is compared shares a scale: names that begin with a size in KiB have a panel for each
size. Bars lie, so that long names stand beside them; the legend is below all panels; an axis is
logarithmic where its values span a decade.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from xvd.bench.report import Cell, Plot, Report
from xvd.errors import ConfigError

WIDTH: Final = 8.0
"""Inches; a page shows some 800 pixels."""

_SIZE = re.compile(r"(\d+ KiB) ")
_NAME_COLUMNS: Final = 26
_DECADE: Final = 10.0
_LARGE: Final = 10_000.0
"""From here on an axis counts in thousands (k) and millions (M)."""

Line = Sequence[tuple[Cell, float]]


def draw(report: Report, path: Path) -> None:
    """Write the picture, of the kind that the suffix says; `ConfigError` without matplotlib."""
    figure = figure_of(report)
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)


def figure_of(report: Report) -> Any:
    """The report's plot as a matplotlib figure; `ConfigError` without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots need matplotlib; install xvd[bench]") from None
    matplotlib.rcParams["svg.hashsalt"] = report.name  # the same figures are the same file
    assert report.plot is not None
    lines = report.plot.lines
    numbers = all(not isinstance(x, str) for line in lines.values() for x, _ in line)
    figure = (_lines if numbers else _bars)(Figure, report.plot)
    figure.suptitle(report.title)
    if len(lines) > 1:
        figure.legend(*_legend(figure), loc="outside lower center", ncols=min(3, len(lines)))
    return figure


def _legend(figure: Any) -> tuple[list[Any], list[str]]:
    """Each label once, whichever panel has it."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def _lines(new: Any, plot: Plot) -> Any:
    figure = new(figsize=(WIDTH, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, line in plot.lines.items():
        axes.plot([x for x, _ in line], [y for _, y in line], marker="o", label=label)
    axes.set(xlabel=plot.x, ylabel=plot.y)
    places = sorted({float(x) for line in plot.lines.values() for x, _ in line})
    if plot.log:
        axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()
    _scale(axes.yaxis, [y for line in plot.lines.values() for _, y in line], axes.set_yscale)
    axes.grid(alpha=0.3)
    return figure


def _bars(new: Any, plot: Plot) -> Any:
    panels = panels_of(plot.lines)
    sizes = [len(next(iter(panel.values()))) for panel in panels.values()]
    height = 1.4 + sum(0.6 + size * (0.22 * len(plot.lines) + 0.3) for size in sizes)
    figure = new(figsize=(WIDTH, height), layout="constrained")
    every = figure.subplots(len(panels), squeeze=False, height_ratios=[size + 1 for size in sizes])
    for axes, (size, panel) in zip(every[:, 0], panels.items(), strict=True):
        _panel(axes, panel)
        axes.set(xlabel=plot.y, ylabel=plot.x, title=size)
    return figure


def panels_of(lines: Mapping[str, Line]) -> dict[str, dict[str, Line]]:
    """The bars by the size that their names begin with, which is taken off; all in one if none
    has one."""
    panels: dict[str, dict[str, list[tuple[Cell, float]]]] = {}
    for label, line in lines.items():
        for x, y in line:
            found = _SIZE.match(str(x))
            size = found[1] if found else ""
            name = str(x).removeprefix(found[0]) if found else x
            panels.setdefault(size, {}).setdefault(label, []).append((name, y))
    return {size: dict(panel) for size, panel in panels.items()}


def _panel(axes: Any, lines: Mapping[str, Line]) -> None:
    names = list(dict.fromkeys(str(x) for line in lines.values() for x, _ in line))
    width = 0.8 / len(lines)
    for number, (label, line) in enumerate(lines.items()):
        at = [names.index(str(x)) + (number - (len(lines) - 1) / 2) * width for x, _ in line]
        axes.barh(at, [y for _, y in line], width, label=label)
    axes.set_yticks(range(len(names)), [textwrap.fill(name, _NAME_COLUMNS) for name in names])
    axes.invert_yaxis()  # the first one above
    _scale(axes.xaxis, [y for line in lines.values() for _, y in line], axes.set_xscale)
    axes.grid(axis="x", alpha=0.3)


def _scale(axis: Any, values: Sequence[float], set_scale: Any) -> None:
    """Logarithmic if the values span a decade, and otherwise from zero on; in k and M if large."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    if min(values) > 0 and max(values) / min(values) >= _DECADE:
        set_scale("log")
        axis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axis.set_minor_formatter(NullFormatter())
    else:
        low, high = axis.get_view_interval()
        axis.set_view_interval(min(0.0, low), max(high, max(values) * 1.05), ignore=True)
    if max(values) >= _LARGE:
        axis.set_major_formatter(EngFormatter(sep=""))
