# SPDX-License-Identifier: Apache-2.0
"""An image as a disk in one call, with an event loop and without; and what `import xvd` gives."""

import asyncio
import errno
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import xvd
from xvd.engines.uri import open_engine
from xvd.errors import ConfigError, EngineError

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


def held() -> tuple[int, int]:
    gc.collect()  # what refers to itself gives back only then
    return len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.fixture
def nothing_kept() -> Iterator[None]:
    """Descriptors and threads are as many afterwards as before."""
    with xvd.open_image("memory:1M"):  # what a process takes once for all
        pass
    before = held()
    yield
    assert held() == before


def is_free(image: Path) -> bool:
    """Whether another one may write to the image: no lock is left on it."""
    open_engine(str(image)).close()
    return True


async def write(storage: str | Path, data: bytes) -> None:
    async with xvd.emulated(storage) as disk:
        await disk.write(5, data)
        await disk.flush()


async def write_by_host(storage: str | Path, data: bytes) -> None:
    async with xvd.EmulatedHost.serving(storage) as disk:
        assert isinstance(disk, xvd.Disk)
        await disk.write(5, data)
        await disk.flush()


@pytest.mark.usefixtures("nothing_kept")
class TestAnImage:
    def test_is_served_by_a_host_with_an_event_loop(self, image: Path) -> None:
        asyncio.run(write_by_host(image, b"hello"))

        assert image.read_bytes()[:12] == bytes(5) + b"hello" + bytes(2)
        assert is_free(image)

    def test_is_served_by_a_host_without_one(self, image: Path) -> None:
        with xvd.EmulatedHost.serving(str(image)) as disk:
            assert isinstance(disk, xvd.SyncDisk)
            disk.write(5, b"hello")
            disk.flush()

        assert image.read_bytes()[:12] == bytes(5) + b"hello" + bytes(2)
        assert is_free(image)

    def test_is_served_once_more_by_the_same_words(self, image: Path) -> None:
        serving = xvd.EmulatedHost.serving(image)
        with serving as disk:
            disk.write(0, b"once")

        with serving as disk:
            assert disk.read(0, 4) == b"once"

    def test_is_written_with_an_event_loop(self, image: Path) -> None:
        asyncio.run(write(image, b"hello"))

        assert image.read_bytes()[:12] == bytes(5) + b"hello" + bytes(2)
        assert is_free(image)

    def test_is_written_without_one(self, image: Path) -> None:
        with xvd.open_image(str(image)) as disk:
            assert isinstance(disk, xvd.SyncDisk)
            assert isinstance(disk.disk, xvd.Disk)
            disk.write(5, b"hello")
            disk.flush()

        assert image.read_bytes()[:12] == bytes(5) + b"hello" + bytes(2)
        assert is_free(image)

    def test_is_given_back_by_an_exception(self, image: Path) -> None:
        with pytest.raises(KeyError), xvd.open_image(image):
            raise KeyError

        assert is_free(image)

    def test_closes_twice(self, image: Path) -> None:
        disk = xvd.open_image(image)
        disk.close()
        disk.close()

        assert is_free(image)

    def test_may_be_read_only(self, image: Path) -> None:
        with xvd.open_image(image, read_only=True) as disk:
            assert disk.disk.read_only
            with pytest.raises(OSError, match="read-only") as refused:
                disk.write(0, b"x")

        assert refused.value.errno == errno.EROFS

    def test_may_have_layers(self, image: Path, expect_log: Callable[[str], None]) -> None:
        expect_log("1/xvda: storage fails")
        with xvd.open_image(image, layers=["error:one_in=1,on=write"]) as disk:
            with pytest.raises(OSError, match="Input/output error") as failed:
                disk.write(0, bytes(512))

        assert failed.value.errno == errno.EIO
        assert is_free(image)

    def test_is_a_file_if_it_is_a_path_whatever_its_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        odd = Path("memory:1M")
        odd.write_bytes(bytes(SIZE * 2))

        with xvd.open_image(odd) as disk:
            assert disk.size == SIZE * 2

    def test_that_is_missing_is_said_to_be(self, tmp_path: Path) -> None:
        with pytest.raises(EngineError, match=r"none\.img: no such image"):
            xvd.open_image(tmp_path / "none.img")

    def test_that_is_in_use_is_said_to_be(self, image: Path) -> None:
        with xvd.open_image(image), pytest.raises(EngineError, match="in use"):
            xvd.open_image(image)

    def test_that_makes_no_sense_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="is no size"):
            xvd.open_image("memory:lots")


class Countdown(xvd.Engine):
    """Storage of our own: it reads as its own offsets, and has no room for anything."""

    def __init__(self) -> None:
        self.closed = 0

    @property
    def info(self) -> xvd.EngineInfo:
        return xvd.EngineInfo(size=SIZE, thread_model=xvd.ThreadModel.PARALLEL)

    def read(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = b"".join(n.to_bytes(8) for n in range(offset, offset + len(buffer), 8))

    def write(self, buffer: memoryview, offset: int) -> None:
        raise OSError(errno.ENOSPC, "no room")

    def close(self) -> None:
        self.closed += 1


class TestAnEngineOfOnesOwn:
    def test_is_served_and_closed(self) -> None:
        engine = Countdown()

        with xvd.EmulatedHost.serving(engine) as disk:
            assert disk.size == SIZE
            assert disk.read(4096, 8) == (4096).to_bytes(8)

        assert engine.closed > 0

    def test_may_fail(self, expect_log: Callable[[str], None]) -> None:
        expect_log("1/xvda: storage fails")
        with xvd.EmulatedHost.serving(Countdown()) as disk:
            with pytest.raises(OSError, match="Input/output error"):
                disk.write(0, bytes(512))

    def test_may_have_layers_and_be_read_only(self) -> None:
        with xvd.EmulatedHost.serving(Countdown(), layers=["stats"], read_only=True) as disk:
            assert disk.disk.read_only

    def test_is_closed_where_a_layer_makes_no_sense(self) -> None:
        engine = Countdown()

        with pytest.raises(ConfigError, match="there is no layer"):
            with xvd.EmulatedHost.serving(engine, layers=["shred"]):
                pass

        assert engine.closed > 0


def test_import_xvd_imports_nothing_but_what_is_asked_for() -> None:
    program = (
        "import sys, xvd\n"
        "print([name for name in sys.modules if name.startswith('xvd.')])\n"
        "print(xvd.XvdError.__module__, set(xvd.__all__) <= set(dir(xvd)))\n"
        "print([name for name in sys.modules if name.startswith('xvd.')])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, result.stderr) == (
        0,
        "[]\nxvd.errors True\n['xvd.errors']\n",
        "",
    )


def test_import_xvd_imports_what_every_python_has_and_little_of_that() -> None:
    command = [sys.executable, "-X", "importtime", "-c", "import xvd"]
    without = [sys.executable, "-X", "importtime", "-c", "import importlib, typing"]

    more, less = (
        {line.rpartition("|")[2].strip() for line in told.stderr.splitlines()}
        for told in (
            subprocess.run(words, check=True, capture_output=True, text=True)
            for words in (command, without)
        )
    )

    assert more - less == {"xvd"}


def test_a_disk_that_is_joined_does_without_the_backend() -> None:
    program = "import sys, xvd; xvd.Disk; print('xvd.backend.server' in sys.modules)"

    result = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )

    assert result.stdout == "False\n"


@pytest.mark.parametrize("name", xvd.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(xvd, name) is not None


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'xvd' has no attribute 'nothing'"):
        xvd.nothing  # noqa: B018


# ---- Misused ----


def test_what_is_served_cannot_be_entered_again(nothing_kept: None) -> None:
    serving = xvd.EmulatedHost.serving("memory:1M")

    async def twice() -> None:
        async with serving as disk:
            with pytest.raises(ConfigError, match=r"call EmulatedHost\.serving for each block"):
                await serving.__aenter__()
            await disk.write(0, b"still there")

    asyncio.run(twice())
    with serving as disk:
        with pytest.raises(ConfigError, match=r"call EmulatedHost\.serving for each block"):
            serving.__enter__()
        disk.write(0, b"still there")


@pytest.mark.filterwarnings("error")
def test_a_closed_disk_without_a_loop_says_so(nothing_kept: None) -> None:
    with xvd.EmulatedHost.serving("memory:1M") as disk:
        pass

    with pytest.raises(OSError, match="the disk is gone: it was closed") as caught:
        disk.read(0, 1)

    assert caught.value.errno == errno.ENODEV
    gc.collect()


def test_threads_may_close_a_disk_at_once(nothing_kept: None) -> None:
    disk = xvd.open_image("memory:1M")
    with ThreadPoolExecutor() as threads:
        closings = [threads.submit(disk.close) for _ in range(4)]

    assert [closing.result() for closing in closings] == [None] * 4
