# SPDX-License-Identifier: Apache-2.0
"""An image that is cut short behind our back: what is gone is an error, and no zeros."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from rig_disk import World, disk_world, opener, run, until
from rig_queue import QueueWorld, rq

from xvd.backend import server as server_module
from xvd.blkif.abi import Op, Status
from xvd.engines.checked import Checked
from xvd.engines.image import FileEngine
from xvd.errors import ConfigError, EngineError

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"d" * 4 * MIB)
    return path


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
@pytest.mark.parametrize(
    ("sector", "status"),
    [(0, Status.OKAY), (2 * MIB // 512 - 8, Status.OKAY), (2 * MIB // 512 - 1, Status.ERROR),
     (2 * MIB // 512, Status.ERROR), (4 * MIB // 512 - 8, Status.ERROR)],
)  # fmt: skip
def test_a_queue_answers_with_an_error(
    image: Path, direct: bool, sector: int, status: Status
) -> None:
    with QueueWorld(Checked(FileEngine(str(image), direct=direct))) as world, world.running():
        os.truncate(image, 2 * MIB)
        world.send(rq(Op.READ, sector, world.segment(0)))
        world.port.notify()
        [answer] = world.collect(1)

    assert answer.status == status


def test_an_engines_read_is_an_error_and_says_where_it_ends(image: Path) -> None:
    engine = FileEngine(str(image))
    os.truncate(image, 4096)

    with pytest.raises(EngineError, match="it ends before byte 4096") as caught:
        engine.read(memoryview(bytearray(8192)), 0)

    assert caught.value.errno == errno.EIO
    assert engine.trouble == ""  # nobody has measured it yet
    assert engine.measure() == 4096
    assert "4096 of its 4194304 bytes are left" in engine.trouble
    engine.close()


def test_what_is_gone_is_not_written_to_once_it_is_known(image: Path) -> None:
    """A write behind the end would bring the rest back as zeros."""
    engine = Checked(FileEngine(str(image)))
    os.truncate(image, 4096)
    engine.measure()

    with pytest.raises(EngineError, match="not within 4096"):
        engine.write(memoryview(b"w" * 512), 8192)

    assert image.stat().st_size == 4096
    engine.close()


def size_of(image: Path) -> int:
    return image.stat().st_size


async def cut(world: World, image: Path, size: int) -> None:
    """Cut it, and let the daemon have measured it."""
    assert world.server is not None
    engine = world.server.device("1/51712").disk.engine
    assert engine is not None
    os.truncate(image, size)
    await until(lambda: engine.info.size == size)


def test_a_disk_does_not_shrink_under_its_guest(
    image: Path, monkeypatch: pytest.MonkeyPatch, expect_log: Any
) -> None:
    monkeypatch.setattr(server_module, "POLL_S", 0.0)
    expect_log(r"cut short behind the disk: 1048576 of its 4194304 bytes are left.*--shrink")

    async def work() -> None:
        async with disk_world() as world, await world.disk(str(image)) as disk:
            await cut(world, image, MIB)
            await until(lambda: bool(expect_log.matching("cut short")))
            assert disk.size == 4 * MIB
            assert await disk.read(0, 4096) == b"d" * 4096
            for offset in (MIB, 2 * MIB, 4 * MIB - 4096):
                with pytest.raises(OSError, match="error") as caught:
                    await disk.read(offset, 4096)
                assert caught.value.errno == errno.EIO
                with pytest.raises(OSError, match="error"):
                    await disk.write(offset, bytes(4096))
            assert size_of(image) == MIB

            os.truncate(image, 6 * MIB)  # brought back, and more
            await until(lambda: disk.size == 6 * MIB)
            assert await disk.read(4 * MIB, 4096) == bytes(4096)

    run(work())
    assert len(expect_log.matching("cut short")) == 1


def test_the_first_error_makes_the_daemon_look(image: Path, expect_log: Any) -> None:
    expect_log("storage fails: Input/output error")
    expect_log("the image was cut short behind the disk")

    async def work() -> None:
        async with disk_world() as world, await world.disk(str(image)) as disk:
            os.truncate(image, MIB)
            with pytest.raises(OSError, match="error"):
                await disk.read(2 * MIB, 4096)
            await until(lambda: bool(expect_log.matching("cut short")))

    run(work())


def test_it_shrinks_if_somebody_says_so(image: Path) -> None:
    async def work() -> None:
        async with disk_world() as world, await world.disk(str(image)) as disk:
            assert world.server is not None
            device = world.server.device("1/51712")
            os.truncate(image, MIB)
            with pytest.raises(ConfigError, match=r"has 2048 sectors, the disk 8192; see --shrink"):
                await device.disk.resize()
            assert disk.size == 4 * MIB

            assert await device.disk.resize(shrink=True) == MIB // 512
            await until(lambda: disk.size == MIB)
            assert device.disk.engine is not None
            assert device.disk.engine.trouble == ""

    run(work())


def test_a_successor_that_finds_a_shorter_image_does_not_shrink_the_disk(
    image: Path, expect_log: Any
) -> None:
    expect_log("the storage has 1048576 bytes, the disk that its guest uses 4194304")
    expect_log("storage fails")

    async def work() -> None:
        async with disk_world() as world, await world.disk(str(image)) as disk:
            assert world.server is not None
            await world.server.close()
            os.truncate(image, MIB)
            await world.serve(opener())
            assert await disk.read(0, 4096) == b"d" * 4096
            assert disk.size == 4 * MIB
            with pytest.raises(OSError, match="error"):
                await disk.read(2 * MIB, 4096)

    run(work())
