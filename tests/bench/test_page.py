# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' page: what another command measured is its end, and written by itself."""

from dataclasses import replace
from pathlib import Path

import pytest
from xen_figures import Figure, keep, kept, markdown

from xvd.bench import page
from xvd.bench.report import Plot, Report, Table, machine

REPORT = Report("limit", "The limit", "As it is.", [Table(("what", "IOPS"), [("xvd", 12.0)])])
WORDS = f"## On real Xen\n\nWhat it is.\n\n{page.TABLES}\n**Seen here.** Much.\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "benchmarks.md"
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "xen.md").write_text(WORDS)
    (tmp_path / "benchmarks" / "xen-trixie-1.md").write_text("### One\n")
    page.write([REPORT], found, rounds=5)
    return found


def test_the_page_ends_with_what_was_measured_on_real_xen(path: Path) -> None:
    _, _, found = path.read_text().partition("| xvd | 12 |\n")

    assert found == "\n## On real Xen\n\nWhat it is.\n\n### One\n\n**Seen here.** Much.\n"


OTHER = Report("nbd", "NBD", "By a socket.", [Table(("what", "MiB"), [("xvd", 7.0)])])
ORDER = ("nbd", "formats", "limit")


@pytest.fixture
def another_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on it is another day, when `path` has its page already."""
    facts = machine() | {"date": "2031-01-01"}
    monkeypatch.setattr(page, "machine", lambda: facts)


def test_what_was_measured_on_the_same_day_of_the_same_commit_is_of_the_same_run(
    path: Path,
) -> None:
    page.write([OTHER], path, rounds=1, order=ORDER)

    assert "| xvd | 12 |\n" in path.read_text()
    assert "earlier run" not in path.read_text()


@pytest.mark.usefixtures("path", "another_day")
def test_what_was_not_measured_again_stays_and_says_of_which_run_it_is(path: Path) -> None:
    page.write([OTHER], path, rounds=1, order=ORDER)
    page.write([OTHER], path, rounds=1, order=ORDER)

    text = path.read_text()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## NBD", "## The limit", "## On real Xen"]
    assert "| xvd | 12 |\n" in text
    assert text.count("*Of an earlier run: ") == 1
    assert "formats" not in text


@pytest.mark.usefixtures("path", "another_day")
def test_what_is_measured_again_is_of_this_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page.write([OTHER], path, rounds=1, order=ORDER)

    facts = machine() | {"date": "2032-01-01"}
    monkeypatch.setattr(page, "machine", lambda: facts)
    page.write([REPORT], path, rounds=1, order=ORDER)

    _, _, limit = path.read_text().partition("## The limit\n")
    assert limit.startswith("\n`xvd bench limit`. As it is.\n")
    assert "## NBD\n\n*Of an earlier run: " in path.read_text()


def test_pictures_of_what_stays_are_kept(path: Path) -> None:
    plot = Plot("x", "y", {"xvd": [(1.0, 2.0), (2.0, 3.0)]})
    page.write([replace(REPORT, plot=plot)], path, rounds=1, order=ORDER)

    page.write([replace(OTHER, plot=plot)], path, rounds=1, order=ORDER)

    assert [report.name for report in page.kept(path.with_suffix(""))] == ["nbd", "limit"]


def test_the_end_is_written_anew_and_the_rest_left(path: Path) -> None:
    before = path.read_text()
    (path.parent / "benchmarks" / "xen-trixie-4.md").write_text("### Four\n")

    page.write_end(path)

    assert path.read_text() == before.replace("### One\n", "### One\n\n### Four\n")


def figure(backend: str, number: int, iops: int, *, frontend: str = "fio") -> Figure:
    return Figure("Xen 4.20", 1, frontend, "a job", backend, number, iops, 1.0, 9.0, iops / 100)


def test_figures_of_backends_side_by_side(tmp_path: Path) -> None:
    figures = [
        figure(backend, number, iops)
        for backend, rounds in {"xvd": (200, 400, 300), "blkback": (100, 100, 200)}.items()
        for number, iops in enumerate(rounds)
    ]
    keep(tmp_path / "figures", figures)

    assert markdown(kept(tmp_path / "figures")) == (
        "### Xen 4.20, one queue\n\nfio; medians of 3 rounds:\n\n"
        "| job | xvd IOPS | blkback IOPS | of blkback | backend CPU us/op: xvd | blkback |\n"
        "|---|--:|--:|--:|--:|--:|\n| a job | 300 | 100 | 2 | 3 | 1 |\n\n"
        "Geometric mean over both tables: 2.00 of blkback.\n"
    )
