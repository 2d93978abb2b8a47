# SPDX-License-Identifier: Apache-2.0
"""The table of outside tools has everything that is run, and nothing that nobody runs."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from xvd.packages import package_of, packages

ROOT = Path(__file__).resolve().parents[1]
RUNNERS = {"run", "Popen", "check_output", "check_call", "create_subprocess_exec"}
DEMANDS = {"requires_tool", "require", "try_run", "run_tool"}
EVERYWHERE = {"bash", "sh", "true", "mkfifo", "git", "make", "ps"}
"""Of what a minimal Debian always has, or was needed to get here."""
OURS = {"xvd"}
ELSEWHERE = {"xl", "domu", "typed"}
"""Run on real Xen only, where xen-rig/build puts them."""


def calls(path: Path) -> Iterator[tuple[str, str]]:
    """(who runs or demands it, the command) of each call in a file that names its command."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        words = node.args
        if name in RUNNERS and words and isinstance(words[0], ast.List | ast.Tuple):
            words = words[0].elts[:1]
        elif name not in DEMANDS:
            continue
        for word in words if name in {"requires_tool", "require"} else words[:1]:
            if isinstance(word, ast.Constant) and isinstance(word.value, str):
                yield name, word.value


def commands_of_tests() -> set[str]:
    files = [path for path in (ROOT / "tests").rglob("*.py") if "xen" not in path.parts]
    return {command for path in files for _, command in calls(path)}


def test_what_tests_run_or_demand_is_in_the_table() -> None:
    wanted = commands_of_tests() - EVERYWHERE - OURS - ELSEWHERE
    unknown = {name for name in wanted if name not in packages() and " " not in name}

    assert unknown == set()


def test_what_tests_demand_is_installed_for_them() -> None:
    demanded = commands_of_tests() & set(packages())

    assert {n for n in demanded if not {"test", "build"} & set(packages()[n][1])} == set()


def test_what_the_measurements_run_is_in_the_table() -> None:
    files = (ROOT / "src" / "xvd" / "bench").glob("*.py")
    wanted = {command for path in files for _, command in calls(path)} - OURS

    assert {name for name in wanted if "bench" not in packages().get(name, ("", ()))[1]} == set()


VARIABLES = {
    "$triplet": ("aarch64-linux-gnu",),
    "${tools}": ("", "aarch64-linux-gnu-"),
    "$qemu": ("qemu-system-x86_64", "qemu-system-aarch64"),
}
"""What the scripts' variables stand for, in one suite or another."""


def needed(script: Path) -> set[str]:
    """What a script asks for by `need`, in whichever suite."""
    lines = re.findall(r"^ *need (.*)$", script.read_text(), re.MULTILINE)
    names = {name for line in lines for name in line.replace('"', "").split()}
    for variable, values in VARIABLES.items():
        names = {name.replace(variable, value) for name in names for value in values}
    return names


@pytest.mark.parametrize(
    ("script", "purpose"),
    [
        ("xen-rig/build", "rig"),
        ("xen-rig/emulator", "rig"),
        ("xen-rig/kernel", "rig"),
        ("xen-rig/run", "rig"),
        ("xen-rig/wheel", "rig"),
        ("tools/cross_wheel", "cross"),
        ("tools/make_deb", "deb"),
    ],
)
def test_what_a_script_needs_is_in_the_table(script: str, purpose: str) -> None:
    names = needed(ROOT / script)

    assert names != set()
    assert {name for name in names if purpose not in packages()[name][1]} == set()


def test_every_purpose_of_the_table_is_one_that_somebody_asks_for() -> None:
    purposes = {user for _, users in packages().values() for user in users}

    assert purposes == {"build", "test", "demo", "bench", "rig", "cross", "deb", "ci"}
    assert package_of("qemu-storage-daemon") == "qemu-system-common"
