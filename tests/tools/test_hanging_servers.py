# SPDX-License-Identifier: Apache-2.0
"""Storage whose server stands still, left under a disk that waits for it."""

import asyncio
import contextlib
import os
import re
import select
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from fuse_file import fuse_file, memory_server
from qemu_img import run_qemu_img
from rig_disk import World, disk_world, run, until
from standstill import standing_still

from xvd.backend.device import Device
from xvd.backend.settings import Settings
from xvd.engines.qemu.engine import QemuEngine
from xvd.errors import ConfigError
from xvd.frontend.disk import Disk

pytestmark = [pytest.mark.tools, pytest.mark.slow]

SIZE = 8 << 20
BLOCK = 4096
APART = 1 << 16
Popen = subprocess.Popen[bytes]


def device(world: World) -> Device:
    assert world.server is not None
    return world.server.device("1/51712")


def in_flight(world: World) -> int:
    return device(world).disk.counters().in_flight


@contextlib.asynccontextmanager
async def hanging_writes(world: World, disk: Disk, count: int) -> AsyncIterator[None]:
    """Writes of blocks, each a request, that are begun and not done; all are done at the end."""
    writes = [asyncio.ensure_future(disk.write(i * APART, block(i))) for i in range(count)]
    await until(lambda: in_flight(world) == count)
    yield
    await asyncio.gather(*writes)


def check(content: bytes, count: int) -> None:
    """See that such writes were done."""
    for i in range(count):
        assert content[i * APART : i * APART + BLOCK] == block(i)


def block(number: int) -> bytes:
    return bytes([number + 1]) * BLOCK


def pid_of(pidfd: int) -> int:
    found = re.search(r"^Pid:\s+(\d+)", Path(f"/proc/self/fdinfo/{pidfd}").read_text(), re.M)
    assert found is not None
    return int(found[1])


def is_open(path: Path) -> bool:
    """Whether this process has a file open, by whatever name."""
    links = (Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
    return any(link.exists() and link.samefile(path) for link in links)


def test_a_storage_daemon_that_stands_still_is_left(
    tmp_path: Path, requires_tool: Callable[[str], str], expect_log: Callable[[str], None]
) -> None:
    requires_tool("qemu-storage-daemon")
    tool = requires_tool("qemu-img")
    one, other = tmp_path / "one.qcow2", tmp_path / "other.img"
    run_qemu_img(tool, "create", "-q", "-f", "qcow2", one, SIZE)
    other.write_bytes(bytes(SIZE))

    async def work() -> None:
        async with disk_world() as world, await world.disk(f"qcow2:{one}") as disk:
            engine = device(world).disk.storage.engine
            while not isinstance(engine, QemuEngine):
                engine = engine.lower  # type: ignore[attr-defined]
            pidfd = os.dup(engine.keeper.pid_fd)
            with standing_still(pid_of(pidfd)):
                async with hanging_writes(world, disk, 16):
                    await device(world).life.swap(str(other), 5, abandon=True)
            check(await disk.read(0, 16 * APART), 16)
            await until(lambda: bool(select.select([pidfd], [], [], 0)[0]))  # the daemon has ended
            os.close(pidfd)

    expect_log("the old one was left with what it had")
    run(work())
    check(other.read_bytes(), 16)
    run_qemu_img(tool, "check", "-q", one)


@pytest.mark.parametrize("copying", [True, False], ids=["copy", "map"])
def test_a_file_whose_file_system_stands_still_is_left(
    tmp_path: Path, expect_log: Callable[[str], None], copying: bool
) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(bytes(SIZE))

    async def work(server: Popen, image: Path) -> None:
        async with disk_world(settings=Settings(copying=copying)) as world:
            async with await world.disk(str(image)) as disk:
                with standing_still(server.pid):
                    async with hanging_writes(world, disk, 8):
                        await device(world).life.swap(str(other), 5, abandon=True)
                check(await disk.read(0, 8 * APART), 8)
            await until(lambda: not is_open(image))

    expect_log("the old one was left with what it had")
    with memory_server(tmp_path / "sock", SIZE) as (server, uri):
        with fuse_file(uri, tmp_path / "mnt") as image:
            run(work(server, image.path))


def test_a_file_that_reads_into_the_guests_pages_by_direct_io_is_not_left(
    tmp_path: Path,
) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(bytes(SIZE))

    async def work(server: Popen, image: Path) -> None:
        async with disk_world() as world, await world.disk(str(image)) as disk:
            assert device(world).disk.storage.engine.info.pins_pages
            with standing_still(server.pid):
                reading = asyncio.ensure_future(disk.read(0, BLOCK))
                await until(lambda: in_flight(world) == 1)
                with pytest.raises(ConfigError, match="by direct I/O still reach pages"):
                    await device(world).life.swap(str(other), 5, abandon=True)
            assert await reading == bytes(BLOCK)

    with memory_server(tmp_path / "sock", SIZE) as (server, uri):
        with fuse_file(uri, tmp_path / "mnt") as image:
            run(work(server, image.path))
