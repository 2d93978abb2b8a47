# SPDX-License-Identifier: Apache-2.0
"""Storage of every kind is exchanged for every other under a load that knows what each one holds.

XVD_SWAPS says how often; the longest stall of each exchange is then printed (pytest -s).
"""

import asyncio
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ceph import Cluster, running_cluster
from exchanges import SIZE, USERS, Storages, told, use
from rig_disk import disk_world

from xvd.frontend.settings import Settings as FrontSettings

SWAPS = int(os.environ.get("XVD_SWAPS", "12"))


@pytest.fixture
def cluster(tmp_path: Path, requires_tool: Callable[[str], str]) -> Iterator[Cluster]:
    with running_cluster(tmp_path / "ceph", requires_tool) as cluster:
        yield cluster


@pytest.mark.slow
@pytest.mark.tools
def test_no_kind_of_storage_loses_anything_when_it_is_exchanged(
    tmp_path: Path, requires_tool: Callable[[str], str], cluster: Cluster
) -> None:
    requires_tool("qemu-storage-daemon")
    raw, qcow2 = tmp_path / "disk.img", tmp_path / "disk.qcow2"
    raw.write_bytes(bytes(SIZE))
    words = [requires_tool("qemu-img"), "create", "-q", "-f", "qcow2", str(qcow2), str(SIZE)]
    subprocess.run(words, check=True)
    kinds = [str(raw), f"qcow2:{qcow2}", "memory:8M", cluster.image("swapped", SIZE)]
    draw = random.Random(1)

    async def work() -> None:
        front = FrontSettings(max_queues=2)
        async with disk_world() as world, await world.disk(kinds[0], front=front) as disk:
            assert world.server is not None
            device, now, stop = world.server.device("1/51712"), kinds[0], asyncio.Event()
            storages = Storages(now)
            users = [asyncio.ensure_future(use(disk, storages, n, stop)) for n in range(USERS)]
            for _ in range(SWAPS):
                now = draw.choice([kind for kind in kinds if kind != now])
                await storages.exchange(now, lambda: device.life.swap(now, 30))  # noqa: B023
            stop.set()
            await asyncio.gather(*users)
            assert device.disk.counters().errors == 0
            print(f"{SWAPS} exchanges: stalls of {told(storages.stalls)}")

    async def limited() -> None:
        async with asyncio.timeout(30 + SWAPS):
            await work()

    asyncio.run(limited())
