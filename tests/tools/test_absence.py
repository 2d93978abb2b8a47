# SPDX-License-Identifier: Apache-2.0
"""Storage that is away for a while under a verified load: a guest sees a delay and no error.

XVD_AWAY_S: for how many seconds.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from ceph import running_cluster
from fuse_file import fuse_file, memory_server
from nbd_support import run as tool
from qemu_img import run_qemu_img
from rig_disk import disk_world, run, until
from standstill import standing_still
from verified_load import contents_of, load

from xvd.backend.settings import Settings
from xvd.engines.interface import Engine
from xvd.engines.qemu.engine import QemuEngine

pytestmark = [pytest.mark.tools, pytest.mark.slow]

SIZE = 32 << 20
AWAY_S = float(os.environ.get("XVD_AWAY_S", "1"))
BACK_S = 60
"""Within which it is used again: what failed is tried again every half minute at least."""

Tool = Callable[[str], str]
Away = Callable[[Engine], AbstractContextManager[None]]


def use_while_away(image: str, away: Away) -> None:
    """Use a disk before, while its storage is away, and after; nothing may fail or be lost."""

    async def work() -> None:
        settings = Settings(on_error="hold")
        async with disk_world(settings=settings) as world, await world.disk(image) as disk:
            assert world.server is not None
            served = world.server.device("1/51712").disk
            contents, stop = contents_of(disk, SIZE, 4), asyncio.Event()
            using = asyncio.ensure_future(load(contents, stop))
            await until(lambda: contents[0].steps > 50 or using.done())
            with away(served.storage.engine):
                await asyncio.wait([using], timeout=AWAY_S)
                steps = contents[0].steps
            await until(lambda: contents[0].steps > steps + 50 or using.done(), BACK_S)
            stop.set()
            await using
            assert served.counters().errors == 0

    run(work(), AWAY_S + BACK_S + 30)


def test_a_storage_daemon_that_stays_dead(
    tmp_path: Path, requires_tool: Tool, expect_log: Callable[[str], None]
) -> None:
    requires_tool("qemu-storage-daemon")
    path = tmp_path / "disk.qcow2"
    run_qemu_img(requires_tool("qemu-img"), "create", "-q", "-f", "qcow2", path, SIZE)

    @contextlib.contextmanager
    def away(engine: Engine) -> Iterator[None]:
        while not isinstance(engine, QemuEngine):
            engine = engine.lower  # type: ignore[attr-defined]
        path.rename(tmp_path / "away")  # no other daemon can begin
        signal.pidfd_send_signal(engine.keeper.pid_fd, signal.SIGKILL)
        yield
        (tmp_path / "away").rename(path)

    use_while_away(f"qcow2:{path}", away)

    expect_log("storage daemon|not flushed")


def test_a_cluster_whose_osd_stands_still(tmp_path: Path, requires_tool: Tool) -> None:
    with running_cluster(tmp_path / "ceph", requires_tool) as cluster:
        use_while_away(cluster.image("away", SIZE), lambda _: standing_still(cluster.osd))


def test_a_file_system_whose_server_stands_still(tmp_path: Path) -> None:
    with memory_server(tmp_path / "sock", SIZE) as (server, uri):
        with fuse_file(uri, tmp_path / "mnt") as image:
            use_while_away(str(image.path), lambda _: standing_still(server.pid))


def test_a_file_system_that_is_full(tmp_path: Path, expect_log: Callable[[str], None]) -> None:
    place = tmp_path / "full"
    place.mkdir()
    image = place / "disk.img"
    tool("mount", "-t", "tmpfs", "-o", f"size={2 * SIZE}", "full", place)

    @contextlib.contextmanager
    def away(_: Engine) -> Iterator[None]:
        used = image.stat().st_blocks * 512
        tool("mount", "-o", f"remount,size={used + (1 << 20)}", place)
        yield
        tool("mount", "-o", f"remount,size={2 * SIZE}", place)

    try:
        image.touch()
        os.truncate(image, SIZE)
        use_while_away(str(image), away)
    finally:
        tool("umount", place)

    expect_log("ENOSPC")
    expect_log("its storage is back")
