# SPDX-License-Identifier: Apache-2.0
"""Storage is known by what it is, not by its name."""

import os
import subprocess
from pathlib import Path

import pytest
from rig_engines import image

from xvd.engines.layers.readonly import ReadOnly
from xvd.engines.memory import MemoryEngine
from xvd.engines.null import NullEngine
from xvd.engines.uri import open_engine


def identity(path: Path | str) -> str:
    engine = open_engine(str(path), read_only=True, layers=["log"])
    try:
        return engine.identity
    finally:
        engine.close()


def test_a_file_is_the_same_under_another_name_and_with_other_contents(tmp_path: Path) -> None:
    before = identity(image(tmp_path))

    (tmp_path / "disk.img").rename(tmp_path / "renamed")
    with (tmp_path / "renamed").open("r+b") as file:
        file.write(b"x" * 512)

    assert identity(tmp_path / "renamed") == before


def test_another_file_of_the_same_name_is_another(tmp_path: Path) -> None:
    path = image(tmp_path)
    before = identity(path)

    path.unlink()  # whether or not its inode's number is given to the next
    image(tmp_path)

    assert identity(path) != before


def test_memory_is_another_each_time_and_null_is_always_the_same() -> None:
    one, two = MemoryEngine(1 << 20), MemoryEngine(1 << 20)

    assert one.identity
    assert one.identity != two.identity
    assert ReadOnly(one).identity == one.identity
    assert NullEngine(1 << 20).identity == ""


def test_a_device_is_another_once_it_was_attached_anew(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("loop devices are root's")
    path = image(tmp_path)
    identities = []
    for _ in range(2):
        attach = ["losetup", "-f", "--show", path]
        device = subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip()
        try:
            identities.append(identity(device))
        finally:
            subprocess.run(["losetup", "-d", device], check=True)

    assert identities[0] != identities[1]
