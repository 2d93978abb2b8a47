# SPDX-License-Identifier: Apache-2.0
"""The pages show the tables that the code has."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_pages_tables_are_those_of_the_code() -> None:
    command = [sys.executable, str(ROOT / "tools/print_tables.py"), "--check"]

    result = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
