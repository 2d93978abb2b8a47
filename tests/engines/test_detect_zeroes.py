# SPDX-License-Identifier: Apache-2.0
"""A write of zeros as data, as zeros that keep their space, or as a hole."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig_engines import image
from rig_queue import QueueWorld, rq

from xvd.blkif.abi import Op, Status
from xvd.engines.file import ZEROES, all_zero
from xvd.engines.uri import open_engine
from xvd.errors import ConfigError

MIB = 1 << 20
FULL = MIB // 512
"""Blocks of an image that is full of data, as stat counts."""


@pytest.fixture
def full(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"d" * MIB)
    os.sync()
    return path


@pytest.fixture
def in_memory() -> Iterator[Path]:
    if not Path("/dev/shm").is_dir():
        pytest.skip("there is no tmpfs in /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as where:
        path = Path(where) / "disk.img"
        path.write_bytes(b"d" * MIB)
        yield path


def write_by_queue(path: Path, zeroes: str, *pages: bytes) -> None:
    """Write pages from the beginning of an image on, in one request."""
    with QueueWorld(f"file:{path},detect-zeroes={zeroes}") as world, world.running():
        for number, page in enumerate(pages):
            world.data(number)[:] = page
        world.send(rq(Op.WRITE, 0, *(world.segment(number) for number in range(len(pages)))))
        world.port.notify()
        [answer] = world.collect(1)
        world.send(rq(Op.FLUSH_DISKCACHE))
        world.port.notify()
        world.collect(1)
    assert answer.status == Status.OKAY


def write_by_engine(path: Path, zeroes: str, *pages: bytes) -> None:
    engine = open_engine(f"file:{path},detect-zeroes={zeroes}")
    engine.write(memoryview(b"".join(pages)), 0)
    engine.flush()
    engine.close()


WAYS = pytest.mark.parametrize("write", [write_by_queue, write_by_engine])


@WAYS
@pytest.mark.parametrize(("zeroes", "freed"), [("off", 0), ("on", 0), ("unmap", 64)])
def test_zeros_are_read_and_take_the_space_that_was_asked_for(
    full: Path, write, zeroes: str, freed: int
) -> None:
    write(full, zeroes, *[bytes(4096)] * 8)

    assert full.read_bytes() == bytes(32768) + b"d" * (MIB - 32768)
    assert full.stat().st_blocks == FULL - freed


@WAYS
@pytest.mark.parametrize("at", [0, 15, 16, 17, 4095, 4096, 8191])
def test_what_is_not_all_zeros_is_data(full: Path, write, at: int) -> None:
    data = bytearray(8192)
    data[at] = 1

    write(full, "unmap", bytes(data[:4096]), bytes(data[4096:]))

    assert full.read_bytes()[:8192] == data
    assert full.stat().st_blocks == FULL


@WAYS
@pytest.mark.parametrize("zeroes", ZEROES)
def test_where_the_file_system_cannot_they_are_data(in_memory: Path, write, zeroes: str) -> None:
    """tmpfs punches holes and has no other way to zero a range."""
    write(in_memory, zeroes, *[bytes(4096)] * 4)

    assert in_memory.read_bytes() == bytes(16384) + b"d" * (MIB - 16384)
    assert in_memory.stat().st_blocks == FULL - (32 if zeroes == "unmap" else 0)


def test_a_sparse_image_stays_sparse(tmp_path: Path) -> None:
    path = image(tmp_path)
    write_by_queue(path, "unmap", *[bytes(4096)] * 11)
    assert path.stat().st_blocks == 0


@pytest.mark.parametrize("scheme", ["", "file:", "raw:"])
def test_the_option_stands_behind_the_path(full: Path, scheme: str) -> None:
    engine = open_engine(f"{scheme}{full},detect-zeroes=unmap")
    engine.write(memoryview(bytes(4096)), 0)
    engine.flush()
    engine.close()
    assert full.stat().st_blocks == FULL - 8


@pytest.mark.parametrize("name", ["a,b.img", "x,detect-zeroes=unmap", "y,detect-zeroes=maybe"])
def test_a_file_of_that_name_is_that_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"d" * 4096)
    engine = open_engine(str(path))
    assert engine.info.size == 4096
    engine.close()


def test_a_word_that_it_does_not_know_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="detect-zeroes takes off, on, unmap, not 'yes'"):
        open_engine(f"{image(tmp_path)},detect-zeroes=yes")


@pytest.mark.parametrize("size", [1, 15, 16, 17, 512])
def test_all_zero(size: int) -> None:
    assert all_zero(bytes(size))
    for at in range(size):
        assert not all_zero(bytes(at) + b"\x80" + bytes(size - at - 1))
    assert not all_zero(b"")
