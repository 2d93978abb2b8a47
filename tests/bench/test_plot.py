# SPDX-License-Identifier: Apache-2.0
"""Every plot can be read: no text over another or cut off, no bar behind a legend, no scale in
which small values vanish."""

import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends import backend_agg

from xvd.bench import page
from xvd.bench.experiments import EXPERIMENTS
from xvd.bench.plot import colours_of, figure_of, panels_of, short
from xvd.bench.report import Plot, Report
from xvd.bench.takeover import WAYS

pytestmark = pytest.mark.slow

PLACES = ("tmpfs", "disk, O_DIRECT")
SMALL = [f"4 KiB random {what}, {place}" for place in PLACES for what in ("read", "write")]
LARGE = [f"128 KiB sequential {what}, {place}" for place in PLACES for what in ("read", "write")]

JOBS = [(job, what) for job in ("4 KiB random", "256 KiB sequential") for what in ("read", "write")]

PLOTS = {
    "storage": Plot(
        "",
        "IOPS, fio being 1",
        {
            who: [(name, 1 + number / 3) for number, name in enumerate(SMALL + LARGE)]
            for who in ("xvd", "copied")
        },
    ),
    "nbd": Plot(
        "",
        "IOPS",
        {
            server: [(f"{job} {what}", iops) for (job, what), iops in zip(JOBS, found, strict=True)]
            for server, found in {
                "nbdkit": (67_733.0, 97_464.0, 4_953.0, 7_595.0),
                "qemu-nbd": (50_406.0, 42_763.0, 3_195.0, 3_743.0),
                "xvd serve": (130_518.0, 130_271.0, 11_608.0, 10_986.0),
            }.items()
        },
    ),
    "vhost-user": Plot(
        "",
        "IOPS",
        {
            name: [("4 KiB random read", 96_668.0), ("256 KiB sequential read", 22_306.0)]
            for name in ("vhost-user-blk, client sleeps", "vhost-user-blk, client polls", "xvd")
        },
    ),
    "limit": Plot(
        "",
        "IOPS, the probe being 1",
        {
            who: [(f"{what}, {how}", 1.66) for what in ("read", "null storage, write")
                  for how in ("events", "polled")]
            for who in ("probe", "xvd")
        },
    ),
    "persistent": Plot(
        "guests",
        "IOPS, all guests",
        {
            "persistent": [(1, 3.7e6), (2, 3.5e6), (5, 3.2e6), (10, 3.1e6)],
            "mapping": [(1, 94_270), (2, 54_188), (5, 54_858), (10, 58_756)],
        },
    ),
    "ring-pages": Plot("pages", "IOPS", {"5 ms": [(1, 6_229), (2, 12_324), (64, 298_730)]}, True),
    "indirect": Plot("segments", "MiB/s", {"1 MiB reads": [(11, 10_660), (32, 9_846), (256, 8_451)]}
    ),
    "queues": Plot(
        "queues",
        "IOPS",
        {
            "measured": [(1, 4.4e6), (2, 3.3e6), (4, 3.5e6), (8, 3.2e6)],
            "model, 24 CPUs": [(1, 5.3e6), (2, 10.6e6), (4, 21.2e6), (8, 42.4e6)],
        },
    ),
    "scale": Plot(
        "ring pages",
        "CPU ns of an operation, both ends",
        {"4 KiB": [(1 << n, 435.0 + 20 * n) for n in range(7)]},
        True,
    ),
    "instructions": Plot(
        "",
        "instructions of a request",
        {
            end: [("null, 1 in a step", 1_540.0), ("null, 8 in a step, 64 pages of ring", 916.0)]
            for end in ("front", "back")
        },
    ),
    "guest-pages": Plot(
        "guest's page",
        "MiB/s",
        {f"{n} segments": [(f"{size}K", 7_337.0 + size) for size in (4, 16, 64)] for n in (11, 32)},
    ),
    "disks": Plot(
        "round",
        "attach to first I/O, alone, ms",
        {"one disk": [(str(number), 27.5 + number) for number in range(1, 6)]},
    ),
    "formats": Plot(
        "",
        "IOPS",
        {
            name: [("random read", 60_000.0), ("random write", 41_000.0)]
            for name in ("vhost-user-blk, client sleeps", "vhost-user-blk, client polls", "xvd",
                         "qemu-nbd, fio")
        },
    ),
    "cluster": Plot(
        "",
        "IOPS",
        {
            name: [("random read", 9_000.0), ("random write", 4_000.0)]
            for name in ("xvd", "fio's rbd engine")
        },
    ),
    "mirror": Plot(
        "",
        "IOPS",
        {
            "xvd": [("no copy", 94_780.0), ("changes are noted", 91_421.0),
                    ("a mirror that is the same", 47_148.0),
                    ("a mirror that is being made", 13_260.0)]
        },
    ),
    "isolation": Plot(
        "idle guests",
        "memory, MiB",
        {
            "shared": [("1", 27.1), ("20", 34.4), ("200", 103.0)],
            "guest": [("1", 46.1), ("20", 222.0), ("200", 1_900.0)],
        },
        True,
    ),
    "takeover": Plot(
        "% of exchanges",
        "wait at most, ms",
        {
            way: [(n, first + n / 4) for n in (10, 25, 50, 75, 90, 100)]
            for way, first in zip(WAYS, (20.0, 280.0, 450.0, 70.0, 100.0), strict=True)
        },
        True,
    ),
    "pressure": Plot("", "pages kept", {"": [("left alone", 1024.0), ("squeezed", 0.0)]}),
}  # fmt: skip
DOCS = Path(__file__).resolve().parents[2] / "docs"
KEPT = {report.name: report for report in page.kept(DOCS / "benchmarks")}
SAMPLES = sorted(PLOTS)
PLOTS |= {f"{name} of the page": report.plot for name, report in KEPT.items() if report.plot}
EVERY = pytest.mark.parametrize("name", PLOTS)


def drawn(name: str) -> tuple[Any, Any]:
    """A plot's figure, and what measures it."""
    figure = figure_of(Report(name, "A title of the usual length", "", [], PLOTS[name]))
    canvas = backend_agg.FigureCanvasAgg(figure)
    canvas.draw()
    return figure, canvas.get_renderer()


def texts(figure: Any) -> list[Any]:
    """Every text that is shown; of an axis' labels those of places that it shows."""
    shown = [figure._suptitle]
    for axes in figure.axes:
        shown += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            shown += [tick.label1 for tick in ticks]
            shown.append(axis.get_offset_text())
    for legend in figure.legends:
        shown += legend.get_texts()
    return [text for text in shown if text.get_visible() and text.get_text()]


@EVERY
def test_no_text_lies_over_another_or_outside(name: str) -> None:
    figure, renderer = drawn(name)
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts(figure)]

    over = [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.overlaps(other)]
    whole = figure.bbox
    outside = [
        text
        for text, box in boxes
        if box.x0 < whole.x0 or box.x1 > whole.x1 or box.y0 < whole.y0 or box.y1 > whole.y1
    ]

    assert (over, outside) == ([], [])


@EVERY
def test_no_legend_lies_over_what_is_drawn(name: str) -> None:
    figure, renderer = drawn(name)

    for legend in figure.legends:
        box = legend.get_window_extent(renderer)
        assert not any(box.overlaps(axes.get_window_extent(renderer)) for axes in figure.axes)
    assert all(axes.get_legend() is None for axes in figure.axes)


@EVERY
def test_every_axis_of_values_has_a_unit_and_shows_its_values(name: str) -> None:
    figure, _ = drawn(name)

    for axes in figure.axes:
        bars = [bar.get_width() for bar in axes.patches if bar.get_width() > 0]
        points = [y for line in axes.lines for y in line.get_ydata()]
        scale = axes.get_xscale() if bars else axes.get_yscale()
        values = bars or points
        assert PLOTS[name].y in (axes.get_xlabel(), axes.get_ylabel())
        assert scale == "log" or max(values) / min(values) < 10


def test_sizes_have_a_panel_each() -> None:
    panels = panels_of(PLOTS["nbd"].lines)

    assert list(panels) == ["4 KiB", "256 KiB"]
    assert panels["256 KiB"]["xvd serve"] == [
        ("sequential read", 11_608.0),
        ("sequential write", 10_986.0),
    ]


def test_xvds_own_bars_stand_out_where_others_are_beside_them() -> None:
    ours, other = colours_of(["xvd serve", "nbdkit"])

    assert ours != other
    assert colours_of(["front", "back"]) == [None, None]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.893, "0.893"), (8156.0, "8,156"), (140_746.0, "141k"), (999_800.0, "1M")],
)
def test_the_value_of_a_bar_is_short(value: float, text: str) -> None:
    assert short(value) == text


def test_a_line_over_decades_has_a_logarithmic_axis() -> None:
    figure, _ = drawn("indirect")

    assert figure.axes[0].get_xscale() == "log"


def test_every_picture_of_the_page_is_there_and_its_kind_is_looked_at() -> None:
    named = re.findall(r"\(benchmarks/([\w-]+\.svg)\)", (DOCS / "benchmarks.md").read_text())

    assert sorted(named) == sorted(path.name for path in (DOCS / "benchmarks").glob("*.svg"))
    assert sorted(named) == [f"{name}.svg" for name in sorted(KEPT)]
    assert set(KEPT) <= set(SAMPLES)
    assert set(SAMPLES) == set(EXPERIMENTS)


def test_what_a_run_drew_can_be_drawn_anew(tmp_path: Path) -> None:
    page.write([Report("nbd", "A title", "", [], PLOTS["nbd"])], tmp_path / "page.md", rounds=1)
    picture = tmp_path / "page" / "nbd.svg"
    drawn_first = picture.read_bytes()
    picture.unlink()

    page.redraw(tmp_path / "page")

    assert picture.read_bytes() == drawn_first
