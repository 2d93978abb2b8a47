# SPDX-License-Identifier: Apache-2.0
"""docs/features.md: no row is missing, and what a row names is there."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAST = {"F": 3, "B": 41, "P": 46}
IDS = [f"{kind}{number}" for kind, last in LAST.items() for number in range(1, last + 1)]
ON_XEN = ("xen", "hostile", "dataplane", "backend", "frontend")
"""The folders whose tests xen-rig/test runs on real Xen."""
LINES = (ROOT / "docs" / "features.md").read_text().splitlines()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in LINES
    if re.match(r"\| [A-Z]\d+ \|", line)
]


@cache
def functions(path: Path) -> dict[str, bool]:
    """The tests of a file, and whether real Xen can run them; none where there is no such file."""
    if not path.is_file():
        return {}
    nodes = ast.parse(path.read_text()).body
    return {
        node.name: not any("beyond_xen" in ast.unparse(mark) for mark in node.decorator_list)
        for node in nodes
        if isinstance(node, ast.FunctionDef)
    }


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def is_a_test(name: str) -> bool:
    path, _, function = name.partition("::")
    return function.startswith("test_") and function in functions(ROOT / path)


def runs_on_xen(name: str) -> bool:
    path, _, function = name.partition("::")
    return Path(path).parts[1] in ON_XEN and functions(ROOT / path).get(function, False)


def test_every_row_is_there_once_and_in_order() -> None:
    assert [row[0] for row in ROWS] == IDS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_names_files_and_tests_that_exist(row: list[str]) -> None:
    _, what, files, emulated, xen = row
    assert what
    assert [name for name in names(files) if not (ROOT / name).is_file()] == []
    assert [name for name in names(emulated) if not is_a_test(name)] == []
    assert [name for name in names(xen) if not runs_on_xen(name)] == []
    assert names(files)
    assert names(emulated)
    assert names(xen) or xen == "-"


@pytest.mark.parametrize(
    "name",
    ["tests/test_features.py::test_that_is_not_there", "tests/nothing.py::test_x", "tests/a.py"],
)
def test_a_name_that_was_mistyped_is_found(name: str) -> None:
    assert not is_a_test(name)


def test_the_folders_that_run_on_xen_are_those_of_the_rig() -> None:
    suites = (ROOT / "xen-rig" / "common.sh").read_text()
    folders, *_ = re.findall(r"everywhere=\(tests/\{(.*)\}\)", suites)
    assert ("xen", *re.sub(r"/\{.*\}", "", folders).split(",")) == ON_XEN


@pytest.mark.parametrize(
    "name",
    [
        "tests/test_features.py::test_a_name_that_was_mistyped_is_found",
        "tests/hostile/test_lie_persistent.py::test_a_grant_that_was_ended_cannot_be_mapped_again",
    ],
)
def test_what_does_not_run_on_xen_cannot_be_named_for_it(name: str) -> None:
    assert is_a_test(name)
    assert not runs_on_xen(name)
