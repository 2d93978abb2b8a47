# SPDX-License-Identifier: Apache-2.0
"""The committed C header is what the generator prints, and what a C compiler takes."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEADER = ROOT / "src/xvd/dataplane/abi_gen.h"


@pytest.mark.slow
def test_the_committed_header_is_fresh() -> None:
    command = [sys.executable, str(ROOT / "tools/gen_abi.py"), "--check"]

    result = subprocess.run(command, capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr


@pytest.mark.tools
def test_the_header_compiles_without_a_warning_of_its_own(tmp_path: Path) -> None:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("gcc is not installed")
    source = tmp_path / "use.c"
    source.write_text(
        f'#include "{HEADER}"\n'
        '_Static_assert(BLKIF_NR_ABI == 3, "three ABIs");\n'
        '_Static_assert(sizeof blkif_refusal_status == 2 * REFUSAL_COUNT, "one per refusal");\n'
    )
    strict = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-const-variable", "-Wno-unused-variable"]

    result = subprocess.run(
        [compiler, *strict, "-fsyntax-only", str(source)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 0, result.stderr
