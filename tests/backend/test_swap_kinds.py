# SPDX-License-Identifier: Apache-2.0
"""Storage of every kind is exchanged for every other under a load that knows what each one holds.

XVD_SWAPS says how often; the longest stall of each exchange is then printed (pytest -s).
"""

import asyncio
import os
import random
import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from ceph import Cluster, running_cluster
from rig_disk import disk_world

from xvd.frontend.disk import Disk
from xvd.frontend.settings import Settings as FrontSettings

T = TypeVar("T")

SIZE, BLOCK, USERS = 8 << 20, 4096, 8
BLOCKS = SIZE // BLOCK
ZEROS = bytes(BLOCK)
SWAPS = int(os.environ.get("XVD_SWAPS", "12"))


class Storages:
    """What each block of each storage may hold: one thing, or several where an operation was under
    way during an exchange and may have gone to either side."""

    def __init__(self, first: str) -> None:
        self._may_hold: dict[str, list[set[bytes]]] = {}
        self._has_been = [first]
        self._exchanging = False
        self.stalls: list[float] = []
        self.forget(first)

    def forget(self, name: str) -> None:
        self._may_hold[name] = [{ZEROS} for _ in range(BLOCKS)]

    async def exchange(self, name: str, swap: Callable[[], Awaitable[None]]) -> None:
        if name.startswith("memory") or name not in self._may_hold:
            self.forget(name)
        self._has_been.append(name)
        self._exchanging = True
        self.stalls.append(0.0)
        await swap()
        self._exchanging = False

    @property
    def _moment(self) -> int:
        """Of an exchange under way, the storage before it."""
        return len(self._has_been) - 1 - self._exchanging

    async def write(self, disk: Disk, block: int, data: bytes) -> None:
        since = self._moment
        await self._timed(disk.write(block * BLOCK, data))
        if since == len(self._has_been) - 1:
            self._may_hold[self._has_been[-1]][block] = {data}
            return
        for name in set(self._has_been[since:]):
            self._may_hold[name][block].add(data)

    async def read(self, disk: Disk, block: int) -> None:
        since = self._moment
        found = bytes(await self._timed(disk.read(block * BLOCK, BLOCK)))
        names = set(self._has_been[since:])
        assert any(found in self._may_hold[name][block] for name in names), (block, names)
        if len(names) == 1:
            self._may_hold[names.pop()][block] = {found}

    async def _timed(self, work: Awaitable[T]) -> T:
        began = time.monotonic()
        result = await work
        if self.stalls:
            self.stalls[-1] = max(self.stalls[-1], time.monotonic() - began)
        return result


async def use(disk: Disk, storages: Storages, user: int, stop: asyncio.Event) -> None:
    """Write and read blocks that nobody else has."""
    draw = random.Random(user)
    while not stop.is_set():
        block = draw.randrange(BLOCKS // USERS) * USERS + user
        if draw.random() < 0.5:
            await storages.write(disk, block, draw.randbytes(16) * (BLOCK // 16))
        else:
            await storages.read(disk, block)
    for block in range(user, BLOCKS, USERS):
        await storages.read(disk, block)


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
            stalls = sorted(1000 * stall for stall in storages.stalls)
            print(f"{SWAPS} exchanges: stalls of {statistics.median(stalls):.1f} ms, "
                  f"at most {stalls[-1]:.1f} ms")  # fmt: skip

    async def limited() -> None:
        async with asyncio.timeout(30 + SWAPS):
            await work()

    asyncio.run(limited())
