# SPDX-License-Identifier: Apache-2.0
"""What a user's type checker says of programs that use xvd as it is installed here.

`make wheel` asks the same of the wheel.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pages import ROOT, snippets_of
from test_readme import README

pytestmark = pytest.mark.slow


def mypy(directory: Path, *programs: Path) -> tuple[int, str]:
    """Run mypy as somebody who has none of this tree's settings, from a directory of his own."""
    environment = {name: value for name, value in os.environ.items() if name != "MYPYPATH"}
    result = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--config-file=", "--no-error-summary"),
            *("--cache-dir", str(directory / "types"), *map(str, programs)),
        ],
        check=False, capture_output=True, text=True, cwd=directory, env=environment,
    )  # fmt: skip
    return result.returncode, result.stdout + result.stderr


def test_examples_and_snippets_are_typed(tmp_path: Path) -> None:
    programs = sorted((ROOT / "examples").glob("*.py"))
    for number, snippet in enumerate(it for it in snippets_of(README) if it.language == "python"):
        programs.append(tmp_path / f"snippet{number}.py")
        programs[-1].write_text(snippet.text)

    assert len(programs) > 4
    assert mypy(tmp_path, *programs) == (0, "")


def test_a_mistake_is_found(tmp_path: Path) -> None:
    """The types are seen: else everything would be Any, and right."""
    program = tmp_path / "mistake.py"
    program.write_text(
        "from xvd import EmulatedHost, SyncDisk\n"
        "with EmulatedHost.serving('a') as disk, SyncDisk.connect(domid=1, vdev='xvda') as other:\n"
        "    reveal_type(disk.read(0, 8))\n"
        "    other.write(0, 'text')\n"
    )

    status, output = mypy(tmp_path, program)

    assert status == 1
    assert 'Revealed type is "bytearray"' in output or "builtins.bytearray" in output
    assert 'Argument 2 to "write" of "SyncDisk" has incompatible type "str"' in output
