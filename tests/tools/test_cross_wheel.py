# SPDX-License-Identifier: Apache-2.0
"""The wheel for another architecture has all that is built here, and nothing of this machine.

Nobody has to install a cross compiler for the tests: this one is skipped without.
"""

import struct
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

import pytest

from xvd.packages import find_tool, package_of

ROOT = Path(__file__).resolve().parents[2]
COMMAND = ROOT / "tools" / "cross_wheel"
COMPILER = "aarch64-linux-gnu-gcc"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
"""Ours, of which there is an interpreter with headers: the tests' own build needed it."""
AARCH64 = 183
"""EM_AARCH64 of elf.h."""


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    if find_tool(COMPILER) is None:
        pytest.skip(f"{COMPILER} is missing: install the package {package_of(COMPILER)}")
    if PYTHON not in ("3.11", "3.13"):
        pytest.skip(f"no Debian suite has Python {PYTHON}")
    done = subprocess.run(
        [COMMAND, "arm64", PYTHON, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def modules(names: Iterable[str]) -> set[str]:
    """The modules' files by path, without what names the language, the Python and the machine."""
    paths = [PurePosixPath(name) for name in names if name.endswith((".py", ".so"))]
    return {str(path.parent / path.name.split(".")[0]) for path in paths}


def elf_machine(header: bytes) -> int:
    assert header[:6] == b"\x7fELF\x02\x01"  # 64 bits, little-endian
    return struct.unpack_from("<H", header, 18)[0]


@pytest.mark.slow
@pytest.mark.tools
@pytest.mark.timeout(1800)  # everything is compiled, the first time
def test_the_arm64_wheel_has_every_module_for_that_machine(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        compiled = [name for name in names if ".so" in PurePosixPath(name).suffixes]
        machines = {elf_machine(archive.read(name)) for name in compiled}
    source = ROOT / "src"
    here = {path.relative_to(source).with_suffix("") for path in source.rglob("*.py*")}

    tag = f"cp{PYTHON.replace('.', '')}"
    assert wheel.name.endswith(f"-{tag}-{tag}-linux_aarch64.whl")
    assert machines == {AARCH64}
    assert {name.partition(".")[2] for name in compiled} == {
        f"cpython-{tag[2:]}-aarch64-linux-gnu.so"
    }
    assert modules(names) == {str(path) for path in here if "__pycache__" not in path.parts}


@pytest.mark.parametrize("arguments", [(), ("sparc", "3.13"), ("arm64", "3.12")])
def test_what_it_cannot_build_is_refused_with_how_to_call_it(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    done = subprocess.run(
        [COMMAND, *arguments, tmp_path / "out"], capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: cross_wheel ARCH PYTHON OUT")
    assert not (tmp_path / "out").exists()
