# SPDX-License-Identifier: Apache-2.0
"""States that a disk's storage keeps, and is given back."""

import asyncio
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from rig_disk import World, disk_world, run

from xvd.backend.snapshots import Snapshots
from xvd.errors import ConfigError, EngineError

SIZE = 8 << 20


@pytest.fixture
def qcow2(tmp_path: Path, requires_tool: Callable[[str], str]) -> str:
    requires_tool("qemu-storage-daemon")
    path = tmp_path / "disk.qcow2"
    words = [requires_tool("qemu-img"), "create", "-q", "-f", "qcow2", str(path), str(SIZE)]
    subprocess.run(words, check=True)
    return f"qcow2:{path}"


def snapshots(world: World) -> Snapshots:
    assert world.server is not None
    return world.server.device("1/51712").snapshots


async def names(world: World) -> list[str]:
    return [one["name"] for one in await snapshots(world).list()]


@pytest.mark.tools
def test_a_disk_goes_back_to_a_state_that_was_kept_under_load(qcow2: str) -> None:
    async def work() -> None:
        async with disk_world() as world, await world.disk(qcow2) as disk:
            assert world.server is not None
            life = world.server.device("1/51712").life
            await disk.write(0, b"1" * 4096)
            writing = asyncio.gather(*(disk.write(n << 16, b"w" * 512) for n in range(1, 60)))
            await snapshots(world).change("create", "monday", 20)
            await writing
            await disk.write(0, b"2" * 4096)
            assert await names(world) == ["monday"]
            await life.pause(20)
            await snapshots(world).change("revert", "monday", 20)
            await life.resume()
            assert await disk.read(0, 4096) == b"1" * 4096
            await snapshots(world).change("delete", "monday", 20)
            assert await names(world) == []
            assert world.server.device("1/51712").disk.counters().errors == 0

    run(work())

    checked = subprocess.run(["qemu-img", "check", "-q", qcow2.partition(":")[2]], check=False)
    assert checked.returncode == 0


@pytest.mark.tools
@pytest.mark.parametrize(
    ("action", "name", "says"),
    [
        ("create", "there", "there is a snapshot there already"),
        ("delete", "lost", "there is no snapshot lost; there are: there"),
        ("revert", "lost", "there is no snapshot lost; there are: there"),
        ("revert", "there", "pause the disk: xvd pause"),
        ("create", "12", "not only digits"),
        ("create", "-x", "is no name of a snapshot"),
        ("create", "", "is no name of a snapshot"),
    ],
)
def test_what_makes_no_sense_is_refused(qcow2: str, action: str, name: str, says: str) -> None:
    async def work() -> None:
        async with disk_world() as world, await world.disk(qcow2) as disk:
            await snapshots(world).change("create", "there", 20)
            with pytest.raises(ConfigError, match=says):
                await snapshots(world).change(action, name, 20)
            assert await names(world) == ["there"]
            await disk.read(0, 512)

    run(work())


def test_storage_that_keeps_none_says_which_does() -> None:
    async def work() -> None:
        async with disk_world() as world, await world.disk() as disk:
            with pytest.raises(EngineError, match=r"qcow2 and rbd do: xvd mirror"):
                await snapshots(world).change("create", "monday", 20)
            await disk.read(0, 512)

    run(work())
