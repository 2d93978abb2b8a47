# SPDX-License-Identifier: Apache-2.0
"""The examples with arguments; test_readme.py runs them without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from xvd_process import FourProcesses

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = pytest.mark.slow


def example(name: str, *arguments: str | Path) -> tuple[int, list[str], str]:
    """Its status, its lines, and what it complains of."""
    command = [sys.executable, "-Werror", str(EXAMPLES / name), *map(str, arguments)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    return result.returncode, result.stdout.splitlines(), result.stderr


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(3 << 20) + bytes(5 << 20))
    return path


def test_an_image_is_backed_up(tmp_path: Path, image: Path) -> None:
    copy = tmp_path / "copy.img"

    status, lines, complaint = example("backup.py", image, copy)

    assert (status, lines[0][:31], lines[1:], complaint) == (
        0, "8 MiB read, 3 MiB written, SHA-", ["the copy is the same"], "",
    )  # fmt: skip
    assert copy.read_bytes() == image.read_bytes()
    assert copy.stat().st_blocks < image.stat().st_blocks


def test_a_guests_disk_is_backed_up(tmp_path: Path, image: Path) -> None:
    copy = tmp_path / "copy.img"
    with FourProcesses(tmp_path, image) as four:
        four.nbd.stop()  # the guest is shut down

        status, _, complaint = example("backup.py", four.directory, "1", "xvda", copy)

    assert (status, complaint) == (0, "")
    assert copy.read_bytes() == image.read_bytes()


def test_a_driver_that_believes_everything_is_found_out() -> None:
    status, lines, complaint = example("lying_backend.py", "true")

    assert (status, lines[0], complaint) == (1, f"{'honest':30}well", "")
    assert len(lines) > 5
    assert all(line.endswith("DOES NOT NOTICE") for line in lines[1:])


def test_a_driver_that_crashes_is_found_out() -> None:
    status, lines, _ = example("lying_backend.py", "sh", "-c", "kill -SEGV $$")

    assert (status, {line[30:] for line in lines}) == (1, {"CRASHES, signal 11"})
