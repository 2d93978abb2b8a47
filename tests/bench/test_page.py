# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' page: what another command measured is its end, and written by itself."""

from pathlib import Path

import pytest
from xen_figures import Figure, keep, kept, markdown

from xvd.bench import page
from xvd.bench.report import Report, Table

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
