# SPDX-License-Identifier: Apache-2.0
"""Memory pressure: from the kernel's trigger to every queue."""

import asyncio
import os
from pathlib import Path

import pytest
from rig_disk import disk_world, run, until

from xvd.backend.pressure import PRESSURE, MemoryPressure
from xvd.backend.settings import Settings


def test_a_squeezed_server_gives_back_what_its_disks_keep() -> None:
    async def work() -> None:
        settings = Settings(copying=True, buffer_squeeze_duration_ms=60_000)
        async with disk_world(settings=settings) as world:
            async with await world.disk() as disk:
                await disk.write(0, bytes(4096))
                assert world.server is not None
                [device] = world.server.devices.values()
                assert device.disk.counters().buffer_pages == 1
                world.server.squeeze()
                await until(lambda: device.disk.counters().buffer_pages == 0)
                assert device.disk.counters().buffer_pages_released == 1

    run(work())


def test_without_the_kernels_file_nothing_is_watched(tmp_path: Path) -> None:
    async def work() -> None:
        pressure = MemoryPressure(lambda: None, tmp_path / "memory")
        assert not pressure.watching
        pressure.close()

    asyncio.run(work())


def test_a_trigger_is_set_on_the_kernels_file() -> None:
    if not os.access(PRESSURE, os.W_OK):
        pytest.skip(f"{PRESSURE} is not there, or not ours to write: the kernel has no PSI")

    async def work() -> None:
        pressure = MemoryPressure(lambda: None)
        assert pressure.watching
        pressure.close()
        assert not pressure.watching

    asyncio.run(work())
