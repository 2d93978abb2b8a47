# SPDX-License-Identifier: Apache-2.0
"""The pages show the tables that the code has."""

import re
import subprocess
import sys
from pathlib import Path

import xvd
from xvd.backend.counters import BackCounters

ROOT = Path(__file__).resolve().parents[1]


def test_the_pages_tables_are_those_of_the_code() -> None:
    command = [sys.executable, str(ROOT / "tools/print_tables.py"), "--check"]

    result = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_the_page_of_the_python_interface_is_that_of_the_docstrings() -> None:
    command = [sys.executable, str(ROOT / "tools/print_api.py"), "--check"]

    result = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_the_page_of_the_python_interface_has_every_name() -> None:
    page = (ROOT / "docs/api.md").read_text()

    names = [name for name in xvd.__all__ if name != "__version__"]

    assert [
        name for name in names if f"### {name}\n" not in page and f"| `{name}` |" not in page
    ] == []


def test_the_page_has_every_figure_once() -> None:
    figures = (ROOT / "docs/settings.md").read_text().partition("## Figures")[2]
    shown = [row.split("|")[1] for row in figures.splitlines() if row.startswith("| `")]

    names = re.findall(r"\w+", " ".join(shown))

    assert sorted(names) == sorted(BackCounters.names())
