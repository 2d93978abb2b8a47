# SPDX-License-Identifier: Apache-2.0
"""Images that cannot be opened: the error names the path and the remedy."""

import errno
import os
from pathlib import Path

import pytest
from rig_engines import image

from xvd.engines.image import FileEngine
from xvd.engines.uri import open_engine
from xvd.errors import EngineError


def refused(path: Path | str, number: int, text: str, **options: bool) -> None:
    with pytest.raises(EngineError, match=text) as caught:
        FileEngine(str(path), **options)
    assert (caught.value.errno, caught.value.filename) == (number, str(path))


def test_a_missing_image(tmp_path: Path) -> None:
    refused(tmp_path / "no.img", errno.ENOENT, "no such image; make one: truncate -s 1G")


@pytest.mark.parametrize("read_only", [False, True])
def test_a_directory(tmp_path: Path, read_only: bool) -> None:
    text = "it is a directory; give an image file or a block device"
    refused(tmp_path, errno.EISDIR, text, read_only=read_only)


@pytest.mark.parametrize("size", [1, 511, 513, 1000])
def test_an_odd_size(tmp_path: Path, size: int) -> None:
    wanted = -(-size // 512) * 512
    refused(
        image(tmp_path, size), errno.EINVAL, f"no multiple of 512; extend it: truncate -s {wanted}"
    )


def test_an_empty_image(tmp_path: Path) -> None:
    refused(image(tmp_path, 0), errno.EINVAL, "the image is empty; give it a size")


def test_neither_file_nor_device() -> None:
    refused("/dev/null", errno.EINVAL, "neither a file nor a block device")


@pytest.mark.parametrize("read_only", [False, True])
def test_a_fifo_does_not_hang(tmp_path: Path, read_only: bool) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    refused(path, errno.EINVAL, "neither a file nor a block device", read_only=read_only)


@pytest.mark.parametrize("second", [False, True], ids=["to write", "to read"])
def test_an_image_in_use(tmp_path: Path, second: bool) -> None:
    path = image(tmp_path)
    first = FileEngine(str(path))
    refused(path, errno.EBUSY, "in use by this process already; detach that", read_only=second)
    first.close()
    FileEngine(str(path)).close()


def test_readers_share_an_image(tmp_path: Path) -> None:
    path = str(image(tmp_path))
    first = FileEngine(path, read_only=True)
    second = FileEngine(path, read_only=True)
    with pytest.raises(EngineError, match="in use"):
        FileEngine(path)
    first.close()
    second.close()


def test_a_failed_opening_holds_nothing(tmp_path: Path) -> None:
    path = image(tmp_path, 1000)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(EngineError):
            open_engine(str(path))
    assert len(os.listdir("/proc/self/fd")) == before


def test_discard_frees_blocks(tmp_path: Path) -> None:
    path = image(tmp_path)
    engine = FileEngine(str(path))
    engine.write(memoryview(b"d" * (1 << 20)), 0)
    engine.flush()
    before = path.stat().st_blocks
    engine.discard(0, 1 << 20)
    engine.close()
    assert path.stat().st_blocks < before
