# SPDX-License-Identifier: Apache-2.0
"""A report's plot as a picture, by matplotlib (the extra ``bench``)."""

from pathlib import Path

from xvd.bench.report import Plot, Report
from xvd.errors import ConfigError


def draw(report: Report, path: Path) -> None:
    """Write the picture, of the kind that the suffix says; `ConfigError` without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("plots need matplotlib; install xvd[bench]") from None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = report.name  # the same figures are the same file
    from matplotlib import pyplot

    assert report.plot is not None
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    numbers = all(not isinstance(x, str) for line in report.plot.lines.values() for x, _ in line)
    (_lines if numbers else _bars)(axes, report.plot)
    axes.set(xlabel=report.plot.x, ylabel=report.plot.y, title=report.title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if len(report.plot.lines) > 1:
        axes.legend()
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def _lines(axes, plot: Plot) -> None:  # type: ignore[no-untyped-def]
    for label, line in plot.lines.items():
        axes.plot([x for x, _ in line], [y for _, y in line], marker="o", label=label)
    if plot.log:
        axes.set_xscale("log", base=2)


def _bars(axes, plot: Plot) -> None:  # type: ignore[no-untyped-def]
    names = list(dict.fromkeys(str(x) for line in plot.lines.values() for x, _ in line))
    width = 0.8 / len(plot.lines)
    for number, (label, line) in enumerate(plot.lines.items()):
        at = [names.index(str(x)) + (number - (len(plot.lines) - 1) / 2) * width for x, _ in line]
        axes.bar(at, [y for _, y in line], width, label=label)
    axes.set_xticks(range(len(names)), names)
