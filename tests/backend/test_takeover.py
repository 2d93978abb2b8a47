# SPDX-License-Identifier: Apache-2.0
"""A backend ends, another takes over, and the guest's user does what it likes meanwhile."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from served_disk import rigged_disk

from xvd.frontend.disk import Disk

BLOCK = 4096


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.touch()
    os.truncate(path, 4 << 20)
    return path


def some_blocks(count: int) -> dict[int, bytes]:
    return {n * BLOCK: bytes([n]) * BLOCK for n in range(count)}


async def write_all(disk: Disk, data: dict[int, bytes]) -> None:
    await asyncio.gather(*(disk.write(at, block) for at, block in data.items()))


async def check_all(disk: Disk, data: dict[int, bytes]) -> None:
    for at, block in data.items():
        assert await disk.read(at, BLOCK) == block


def test_a_disk_may_be_closed_while_a_successor_takes_over() -> None:
    # The frontend waited for answers from a backend that, seeing it close, had not taken up the
    # ring at all: both waited for ever.
    async def scenario() -> None:
        async with rigged_disk("memory:64M") as rig:
            data = bytes(BLOCK)
            writes = [asyncio.create_task(rig.disk.write(n * BLOCK, data)) for n in range(16)]
            await asyncio.sleep(0)
            for write in writes:
                write.cancel()
            await asyncio.sleep(0)
            await rig.restart_backend()

    asyncio.run(scenario())


@pytest.mark.slow
def test_twenty_restarts_under_load_lose_nothing_on_one_connection(image: Path) -> None:
    async def scenario() -> None:
        async with rigged_disk(str(image)) as rig:
            for _ in range(20):
                data = some_blocks(128)
                writing = asyncio.create_task(write_all(rig.disk, data))
                await asyncio.sleep(0)
                await rig.restart_backend()
                await writing
                await check_all(rig.disk, data)
            assert rig.disk.connections == 1

    asyncio.run(scenario())


def test_without_a_journal_the_frontend_begins_anew_and_nothing_is_lost(
    image: Path, expect_log: Callable[[str], None]
) -> None:
    expect_log("left no journal")
    # Apart, so that none are merged, and slow: when the backend ends there are some on every ring.
    data = {2 * at: block for at, block in some_blocks(256).items()}

    async def scenario() -> int:
        async with rigged_disk(str(image), layers=["delay:write=1ms"]) as rig:
            writing = asyncio.create_task(write_all(rig.disk, data))
            await asyncio.sleep(0)
            await rig.restart_backend(keep_journals=False)
            await writing
            await check_all(rig.disk, data)
            return rig.disk.connections

    assert asyncio.run(scenario()) == 2
