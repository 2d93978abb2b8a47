# SPDX-License-Identifier: Apache-2.0
"""What README says of speed is what docs/benchmarks.md has."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = " ".join((ROOT / "README.md").read_text().split())
PAGE = (ROOT / "docs" / "benchmarks.md").read_text()
ONE_QUEUE = (ROOT / "docs" / "benchmarks" / "xen-trixie-1.md").read_text()


def column(job: str, number: int, page: str = PAGE) -> list[float]:
    """The numbers of a column, over the rows whose name matches."""
    rows = [line.strip("|").split("|") for line in page.splitlines() if re.match(job, line)]
    return [float(row[number].strip().replace(",", "")) for row in rows]


LOAD = r"\| (4|128) KiB (random|sequential) \w+, depth \d+ \|"
NBD = (
    r"\| (4|256) KiB (random|sequential) \w+ \| [\d,]+ \| [\d,]+ \| [\d,]+ \| [\d.]+ \| [\d.]+ \|$"
)


def on_xen(number: int) -> list[float]:
    """The least and the most of a column of the table of one queue on real Xen."""
    found = column(LOAD, number, ONE_QUEUE)
    return [min(found), max(found)]


CLAIMS = {
    "1.1 to 1.5 times as fast as nbdkit": (
        "{:.1f} to {:.1f}",
        lambda: [min(column(NBD, 4)), max(column(NBD, 4))],
    ),
    "2.2 to 3.4 times as fast as qemu-nbd": (
        "{:.1f} to {:.1f}",
        lambda: [min(column(NBD, 5)), max(column(NBD, 5))],
    ),
    "1.12 to 3.4 times as fast as Linux's xen-blkback": (
        "{:.2f} to {:.1f}", lambda: on_xen(4)
    ),
    "1.9 to 114 times as fast as QEMU's": (
        "{:.1f} to {:.0f}", lambda: on_xen(5)
    ),
}  # fmt: skip


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_figure_of_readme_is_the_pages(claim: str) -> None:
    form, numbers = CLAIMS[claim]

    assert claim in README
    assert form.format(*numbers()) in claim


def test_readme_says_of_which_run_its_figures_are() -> None:
    """Of its own run, where the page's last run did not measure that again."""
    [last] = re.findall(r"^\| date \| (.*) \|$", PAGE, re.MULTILINE)
    earlier = re.search(r"^\*Of an earlier run: ([\d-]+),.*\n\n`xvd bench nbd`", PAGE, re.MULTILINE)
    date = earlier[1] if earlier else last

    assert f"the run of {date} in" in README
