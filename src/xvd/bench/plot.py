# SPDX-License-Identifier: Apache-2.0
"""A report's plot as a picture, by matplotlib (the extra ``bench``).

Only what is compared shares a scale: names that begin with a size in KiB have a panel for each
size. Bars lie, so that long names stand beside them, and each has its value at its end; xvd's own
stand out where others are beside them. The legend is below all panels; an axis is logarithmic where
its values span a decade.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from xvd.bench.report import Cell, Plot, Report, show
from xvd.errors import ConfigError

WIDTH: Final = 8.0
"""Inches; a page shows some 800 pixels."""

_SIZE = re.compile(r"(\d+ KiB) ")
_NAME_COLUMNS: Final = 26
_DECADE: Final = 10.0
_LARGE: Final = 10_000.0
"""From here on an axis counts in thousands (k) and millions (M)."""
_UNITS: Final = {"M": 1e6, "k": 1e3}
_OURS: Final = "#1f5fa8"
_OTHERS: Final = ("#b0b7bf", "#d8b27a", "#a9c5a0", "#c6aecb")
"""Colours of bars: the labels that begin with xvd, and what it is compared with."""
_PAPER: Final = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
"""What lies behind the value of a bar, so that no line crosses it."""

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
    if plot.log or places[-1] >= _DECADE * places[0] > 0:
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
        if plot.y.endswith(" being 1"):
            axes.axvline(1.0, color="black", linewidth=0.8, linestyle="--", zorder=0.5)
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
    colours = colours_of(list(lines))
    for number, (label, line) in enumerate(lines.items()):
        at = [names.index(str(x)) + (number - (len(lines) - 1) / 2) * width for x, _ in line]
        bars = axes.barh(at, [y for _, y in line], width, label=label, color=colours[number])
        axes.bar_label(bars, [short(y) for _, y in line], padding=3, fontsize="small", bbox=_PAPER)
    axes.set_yticks(range(len(names)), [textwrap.fill(name, _NAME_COLUMNS) for name in names])
    axes.invert_yaxis()  # the first one above
    _scale(axes.xaxis, [y for line in lines.values() for _, y in line], axes.set_xscale)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def colours_of(labels: Sequence[str]) -> list[str | None]:
    """Return a colour for each label; none, for matplotlib's own, unless some are not xvd's."""
    ours = [label.startswith("xvd") for label in labels]
    if all(ours) or not any(ours):
        return [None] * len(labels)
    others = iter(_OTHERS)
    return [_OURS if our else next(others) for our in ours]


def short(value: float) -> str:
    """Return a number as it stands at a bar: 1.32M, 141k, 8,156, 0.893."""
    if value < _LARGE:
        return show(value)
    unit = next(unit for unit, size in _UNITS.items() if value >= 0.9995 * size)
    return f"{value / _UNITS[unit]:.3g}{unit}"


def _scale(axis: Any, values: Sequence[float], set_scale: Any) -> None:
    """Logarithmic if the values span a decade, and otherwise from zero on; in k and M if large."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    if min(values) > 0 and max(values) / min(values) >= _DECADE:
        set_scale("log")
        axis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axis.set_minor_formatter(NullFormatter())
    else:
        low, high = axis.get_view_interval()
        # Room for what stands at the end of the longest bar.
        axis.set_view_interval(min(0.0, low), max(high, max(values) * 1.12), ignore=True)
    if max(values) >= _LARGE:
        axis.set_major_formatter(EngFormatter(sep=""))
