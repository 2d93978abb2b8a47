# SPDX-License-Identifier: Apache-2.0
"""What README says of speed is what docs/benchmarks.md has."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = " ".join((ROOT / "README.md").read_text().split())
PAGE = (ROOT / "docs" / "benchmarks.md").read_text()
ONE_QUEUE = (ROOT / "docs" / "benchmarks" / "xen-trixie-1.md").read_text()


def cell(row: str, column: int, nth: int = 0) -> float:
    """A number of the page: of the nth table row that begins so, the column."""
    rows = [line for line in PAGE.splitlines() if line.startswith(f"| {row} |")]
    text = rows[nth].strip("|").split("|")[column].strip()
    return float(text.replace(",", ""))


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


def of_the_probe(what: str) -> float:
    """IOPS beside those of the C program that never sleeps."""
    return cell(f"xvd, polled: {what}", 1) / cell(f"probe, polled: {what}", 1)


CLAIMS = {
    "does 2.3 times as many 4 KiB reads": ("{:.1f}", lambda: [cell("xvd, events: read", 4)]),
    "3.1 times as many writes": ("{:.1f}", lambda: [cell("xvd, events: write", 4)]),
    "1.2 to 1.3 million": (
        "{:.1f} to {:.1f}",
        lambda: [cell(f"xvd, polled: {what}", 1) / 1e6 for what in ("read", "write")],
    ),
    "1.1 to 1.5 times as fast as nbdkit": (
        "{:.1f} to {:.1f}",
        lambda: [min(column(NBD, 4)), max(column(NBD, 4))],
    ),
    "2.2 to 3.4 times as fast as qemu-nbd": (
        "{:.1f} to {:.1f}",
        lambda: [min(column(NBD, 5)), max(column(NBD, 5))],
    ),
    "1.2 to 1.6 times as many as a C program that never sleeps": (
        "{:.1f} to {:.1f}", lambda: [of_the_probe("read"), of_the_probe("write")]
    ),
    "do 4.8 million operations": (
        "{:.1f}", lambda: [column(r"\| 2 \| persistent \| [\d,]+ \| [\d.e-]+ \|", 2)[0] / 1e6]
    ),
    "73 thousand where each": (
        "{:.0f}", lambda: [column(r"\| 2 \| mapping \| [\d,]+ \| [\d.e-]+ \|", 2)[0] / 1e3]
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
