# SPDX-License-Identifier: Apache-2.0
"""Our frontend on our backend in every shape that two drivers can agree on, with the data verified.

Every two choices meet in one of the cases; XVD_MATRIX=all runs every combination there is.
"""

import asyncio
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import product

import pytest
from pairwise import all_pairs, pairs_of, pairwise_cases
from rig_disk import disk_world, run

from xvd.backend.device import Device
from xvd.backend.settings import Settings as BackSettings
from xvd.blkif.abi import MAX_SEGMENTS_PER_REQUEST, Abi
from xvd.blkif.assignment import BackendAssignment
from xvd.engines.checked import Checked
from xvd.engines.interface import Engine, EngineInfo
from xvd.engines.memory import MemoryEngine
from xvd.frontend.disk import Disk
from xvd.frontend.settings import Settings
from xvd.machine.emulated.limits import Limits

KIB, MIB = 1 << 10, 1 << 20
SIZE = 24 * MIB
PATTERN = random.Random(4).randbytes(SIZE)
DIRECT = MAX_SEGMENTS_PER_REQUEST * 4 * KIB
MODES = {"persistent": "persistent grants", "map": "mapping", "copy": "grant copy"}
DIMENSIONS = (
    tuple(Abi),
    (4 * KIB, 16 * KIB, 64 * KIB),
    tuple(MODES),
    (0, 32, 256, 4096),
    (0, 2, 4, 6),
    (1, 2, 4),
    ("flush", "barrier", "none"),
)


@dataclass(frozen=True)
class Case:
    """One combination. durable: by flushes, by barriers with data, or not: such is the storage."""

    abi: Abi
    page_size: int
    mode: str
    indirect: int
    order: int
    queues: int
    durable: str

    def __str__(self) -> str:
        numbers = f"{self.page_size // KIB}K-{self.indirect}seg-order{self.order}-{self.queues}q"
        return f"{self.abi.protocol}-{self.mode}-{numbers}-{self.durable}"

    @property
    def request_bytes(self) -> int:
        """What one request carries: whole guest pages, or less than one if it cannot hold one."""
        most = max(self.indirect * 4 * KIB, DIRECT)
        return most // self.page_size * self.page_size or most

    @property
    def rich(self) -> bool:
        """Whether the storage flushes and discards."""
        return self.durable != "none"

    @property
    def backend(self) -> BackSettings:
        return BackSettings(
            copying=self.mode == "copy",
            max_ring_page_order=self.order,
            max_queues=self.queues,
            max_indirect_segments=self.indirect,
        )

    @property
    def frontend(self) -> Settings:
        return Settings(
            max_queues=self.queues,
            max_ring_page_order=self.order,
            max_indirect_segments=self.indirect,
            feature_persistent=self.mode != "map",
            page_size=self.page_size,
        )


EVERY = [Case(*values) for values in product(*DIMENSIONS)]
COVERING = [Case(*values) for values in pairwise_cases(DIMENSIONS)]
CASES = EVERY if os.environ.get("XVD_MATRIX") == "all" else COVERING


class Memory(MemoryEngine):
    """Memory that flushes and discards, or neither."""

    rich = True

    @property
    def info(self) -> EngineInfo:
        return replace(super().info, can_flush=self.rich, can_discard=self.rich)


class Pair:
    """Both ends of one connected disk, what it should hold, and the storage behind it."""

    def __init__(self, case: Case, disk: Disk, device: Device, storage: MemoryEngine) -> None:
        assert device.disk.connection is not None
        self.case = case
        self.disk = disk
        self.device = device
        self.backend = device.disk.connection
        self.storage = storage
        self.expected = bytearray(SIZE)

    async def write(self, offset: int, length: int, *, fua: bool = False) -> None:
        data = memoryview(PATTERN)[offset : offset + length]
        self.expected[offset : offset + length] = data
        await self.disk.write(offset, data, fua=fua)

    async def check_range(self, offset: int, length: int) -> None:
        """It reads as it should, and lies in the storage where it should."""
        expected = memoryview(self.expected)[offset : offset + length]
        assert self.storage.view[offset : offset + length] == expected
        assert await self.disk.read(offset, length) == expected

    def check_negotiated(self) -> None:
        case, config, features = self.case, self.backend.config, self.disk.features
        rings = (len(config.queues), config.ring_pages)
        assert (config.abi, rings) == (case.abi, (case.queues, 1 << case.order))
        assert self.backend.mode == MODES[case.mode]
        assert config.persistent == (case.mode != "map")
        assert features.persistent == (case.mode != "copy")
        assert features.max_indirect_segments == case.indirect
        offered = (features.flush, features.barrier, features.discard)
        assert offered == (case.rich,) * 3
        assert (self.disk.can_flush, self.disk.can_discard) == (case.rich, case.rich)

    async def small_writes(self) -> None:
        """A sector, the end of a page, and many at once that begin and end anywhere."""
        await self.write(3 * 512, 512)
        await self.write(self.case.page_size - 512, 1024)
        places = [(64 + 12 * number) * KIB + 100 * number for number in range(48)]
        await asyncio.gather(*(self.write(at, 5000) for at in places))
        await asyncio.gather(*(self.check_range(at, 5000) for at in places))
        await self.check_range(0, MIB)

    async def large_write(self) -> None:
        """A little more than a request holds, from within a page on: it takes two requests."""
        length = self.case.request_bytes + 3 * 512
        before = self.disk.counters()
        await self.write(MIB + 5 * 512, length)
        await self.check_range(MIB, length + 8 * KIB)
        after = self.disk.counters()
        assert after.wr_req - before.wr_req == 2
        assert after.rd_req - before.rd_req == 2
        assert after.indirect - before.indirect == (2 if self.case.indirect else 0)

    async def durable_writes(self) -> None:
        """A barrier with as much data as it can have, or a write; then a flush."""
        barrier = self.case.durable == "barrier"
        length = min(self.case.request_bytes, DIRECT)
        await self.write(20 * MIB + 512, length, fua=barrier)
        await self.disk.flush()
        assert (
            self.disk.counters().f_req == {"flush": 1, "barrier": 2, "none": 0}[self.case.durable]
        )
        await self.check_range(20 * MIB, length + KIB)

    async def discard(self) -> None:
        if not self.case.rich:
            with pytest.raises(OSError, match="does not offer discard"):
                await self.disk.discard(0, SIZE)
            return
        await self.disk.discard(70 * KIB, 40 * KIB)
        self.expected[70 * KIB : 110 * KIB] = bytes(40 * KIB)  # as this storage does it
        await self.check_range(64 * KIB, 64 * KIB)

    def check_counters(self) -> None:
        """Both ends have counted the same, on every queue, and moved data as agreed."""
        front, back = self.disk.counters(), self.backend.counters()
        names = ("rd_req", "wr_req", "f_req", "ds_req", "rd_sect", "wr_sect")
        assert [getattr(front, name) for name in names] == [getattr(back, name) for name in names]
        assert (front.errors, back.errors, back.refusals) == (0, 0, {})
        assert all(link.queue.counters()["wr_req"] for link in self.backend.links)
        assert bool(back.mapped) == (self.case.mode != "copy")
        reused = bool(front.reused), bool(back.persistent_hits)
        assert reused == (self.case.mode == "persistent",) * 2


@asynccontextmanager
async def connected(case: Case) -> AsyncIterator[Pair]:
    """A whole machine with a disk of such a shape; at the end its accounting is balanced."""
    storage = Memory(SIZE)
    storage.rich = case.rich

    async def open_storage(assignment: BackendAssignment) -> Engine:
        return Checked(storage)

    async with disk_world(
        open_storage=open_storage, settings=case.backend, limits=Limits()
    ) as world:
        vbd = await world.attach()
        machine, store = await world.guest()
        path = f"device/vbd/{vbd.vdev}"
        async with await Disk.open(
            machine, store, path, abi=case.abi, settings=case.frontend
        ) as disk:
            assert world.server is not None
            [device] = world.server.devices.values()
            yield Pair(case, disk, device, storage)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_ends_agree_and_keep_the_data(case: Case) -> None:
    async def work() -> None:
        async with connected(case) as pair:
            pair.check_negotiated()
            await pair.small_writes()
            await pair.large_write()
            await pair.durable_writes()
            await pair.discard()
            pair.check_counters()

    run(work())


def test_every_two_choices_meet_in_a_case() -> None:
    met = {pair for values in pairwise_cases(DIMENSIONS) for pair in pairs_of(values)}
    assert met == set(all_pairs(DIMENSIONS))


def test_the_whole_product_is_every_combination_once() -> None:
    assert len(EVERY) == len(set(EVERY)) == 3888
    assert set(COVERING) <= set(EVERY)
