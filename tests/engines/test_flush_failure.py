# SPDX-License-Identifier: Apache-2.0
"""After a flush that failed none is acknowledged: the kernel has forgotten the data by then.

A loop device on a file system that is full takes writes into the page cache and cannot write them
back. When there is room again the kernel's own fdatasync succeeds, and the data is not there.
"""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from rig_disk import disk_world, run, until
from rig_queue import QueueWorld, rq

from xvd.blkif.abi import Op, Status
from xvd.engines.checked import Checked
from xvd.engines.image import FileEngine
from xvd.engines.interface import Engine
from xvd.engines.layers.log import Log
from xvd.engines.layers.stats import Stats
from xvd.errors import EngineError

MIB = 1 << 20


class FullStore:
    """A device of 8 MiB whose storage has room for one."""

    def __init__(self, device: str, where: Path) -> None:
        self.device = device
        self._where = where

    def get_room(self) -> None:
        subprocess.run(["mount", "-o", "remount,size=32m", str(self._where)], check=True)


@pytest.fixture
def store(tmp_path: Path, requires_tool: Callable[[str], str]) -> Iterator[FullStore]:
    losetup, mount = requires_tool("losetup"), requires_tool("mount")
    if os.geteuid() != 0:
        pytest.skip("a loop device needs root")
    where = tmp_path / "store"
    where.mkdir()
    with ExitStack() as undo:
        subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "none", str(where)], check=True)
        undo.callback(subprocess.run, ["umount", str(where)], check=True)
        (where / "disk").touch()
        os.truncate(where / "disk", 8 * MIB)
        command = [losetup, "-f", "--show", str(where / "disk")]
        made = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        undo.callback(subprocess.run, [losetup, "-d", made], check=True)
        yield FullStore(made, where)


def fill(engine: Engine) -> None:
    for at in range(0, 4 * MIB, MIB):
        engine.write(memoryview(b"w" * MIB), at)


def test_a_later_flush_is_not_acknowledged(store: FullStore) -> None:
    engine = FileEngine(store.device, direct=False)
    fill(engine)
    with pytest.raises(EngineError) as caught:
        engine.flush()
    store.get_room()

    with pytest.raises(EngineError, match="what was written before it may be lost"):
        engine.flush()
    assert caught.value.errno in (errno.ENOSPC, errno.EIO)
    assert "a flush failed" in engine.trouble
    engine.close()


def test_who_opens_it_anew_begins_anew(store: FullStore) -> None:
    engine = FileEngine(store.device, direct=False)
    fill(engine)
    with pytest.raises(EngineError):
        engine.flush()
    store.get_room()
    engine.close()

    again = FileEngine(store.device)
    again.flush()
    assert again.trouble == ""
    again.close()


def flushed(world: QueueWorld) -> Status:
    world.send(rq(Op.FLUSH_DISKCACHE))
    world.port.notify()
    [answer] = world.collect(1)
    return Status(answer.status)


def as_it_is(engine: Engine) -> Engine:
    return engine


@pytest.mark.parametrize("layer", [as_it_is, Stats, Log], ids=["compiled", "stats", "log"])
def test_nor_is_one_of_another_queue(store: FullStore, layer: Callable[[Engine], Engine]) -> None:
    engine = Checked(layer(FileEngine(store.device, direct=False)))
    with QueueWorld(engine) as first, first.running():
        with QueueWorld(engine) as second, second.running():
            fill(engine)
            assert flushed(first) == Status.ERROR
            store.get_room()

            assert [flushed(world) for world in (second, first, second)] == [Status.ERROR] * 3
        with pytest.raises(EngineError, match="what was written before it may be lost"):
            engine.flush()


def test_neither_a_barrier_nor_a_write_through_succeeds_and_it_is_told_once(
    store: FullStore, expect_log: Any
) -> None:
    expect_log("a flush failed .*no flush succeeds until the image is opened anew")

    async def work() -> None:
        async with disk_world() as world, await world.disk(store.device) as disk:
            assert world.server is not None
            engine = world.server.device("1/51712").disk.engine
            assert engine is not None
            fill(engine)
            for _ in range(3):
                with pytest.raises(OSError, match="error"):
                    await disk.flush()
            store.get_room()
            with pytest.raises(OSError, match="error"):
                await disk.flush()
            with pytest.raises(OSError, match="error"):
                await disk.write(0, bytes(512), fua=True)
            await until(lambda: bool(expect_log.lines))

    run(work())
    assert len(expect_log.matching("a flush failed")) == 1
