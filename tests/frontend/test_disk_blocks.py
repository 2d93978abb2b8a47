# SPDX-License-Identifier: Apache-2.0
"""Any byte range on backends of any block size; on the wire every unit is of 512 bytes."""

import asyncio
import random
from dataclasses import replace

import pytest
from rig_backend import BARE, RICH, model_disk
from rig_disk import disk_world, run
from rig_guest import RawBackend

from xvd.blkif.messages import DiscardRequest, IndirectRequest, Request
from xvd.errors import XvdError
from xvd.toolstack.vbd import add
from xvd.toolstack.xldisk import parse_xl_disk
from xvd.types import Domid

BLOCKS = pytest.mark.parametrize("block", [512, 1024, 2048, 4096])


@BLOCKS
@pytest.mark.parametrize("features", [RICH, BARE], ids=["rich", "bare"])
def test_any_range_can_be_written_and_read(block: int, features) -> None:
    """The backend refuses what is no whole number of its blocks, and has nothing to refuse."""

    async def work() -> None:
        offered = replace(features, sector_size=block, physical_sector_size=block)
        async with disk_world(serve=False) as world, model_disk(world, offered) as (disk, backend):
            draw = random.Random(block)
            model = bytearray(1 << 20)
            for _ in range(60):
                size = draw.choice((1, 511, 513, 4095, 4097, 45056, 45057, 150_001))
                at = draw.randrange(len(model) - size)
                data = draw.randbytes(size)
                await disk.write(at, data)
                model[at : at + size] = data
                at = draw.randrange(len(model) - size)
                assert await disk.read(at, size) == model[at : at + size]
            assert backend.storage[: len(model)] == model

    run(work())


@BLOCKS
def test_writers_of_one_block_lose_nothing(block: int) -> None:
    async def work() -> None:
        offered = replace(RICH, sector_size=block)
        async with disk_world(serve=False) as world, model_disk(world, offered) as (disk, backend):
            pieces = [(i * 37, bytes([i + 1]) * 37) for i in range(200)]
            await asyncio.gather(*(disk.write(at, data) for at, data in pieces))
            assert backend.storage[: 200 * 37] == b"".join(data for _, data in pieces)

    run(work())


def test_numbers_on_the_wire_count_512_bytes() -> None:
    async def work() -> None:
        offered = replace(RICH, sector_size=4096, discard_granularity=4096)
        async with disk_world(serve=False) as world, model_disk(world, offered) as (disk, backend):
            assert (disk.size, disk.logical_block_size) == (8192 * 512, 4096)
            await disk.write(3 * 4096, bytes(2 * 4096))
            await disk.discard(5 * 4096, 4096)
            write, discard = backend.seen
            assert isinstance(write, Request)
            assert isinstance(discard, DiscardRequest)
            assert (write.sector_number, sum(s.sectors for s in write.segments)) == (24, 16)
            assert (discard.sector_number, discard.nr_sectors) == (40, 8)

    run(work())


@pytest.mark.parametrize("size", [45056, 131072, 200_000 // 4096 * 4096])
def test_requests_end_on_blocks(size: int) -> None:
    async def work() -> None:
        offered = replace(RICH, sector_size=4096, max_indirect_segments=20)
        async with disk_world(serve=False) as world, model_disk(world, offered) as (disk, backend):
            await disk.write(4096, bytes(size))
            assert all(isinstance(r, Request | IndirectRequest) for r in backend.seen)
            assert all(request.sector_number % 8 == 0 for request in backend.seen)  # type: ignore[union-attr]

    run(work())


@pytest.mark.parametrize(("block", "segments"), [(65536, 0), (65536, 12)])
def test_blocks_that_fit_no_request(block: int, segments: int) -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world:
            await world.guest(1)
            disk = parse_xl_disk("vdev=xvda,target=memory:1M")
            vbd = await add(world.store, Domid(1), disk, Domid(0))
            backend = RawBackend(world, vbd)
            opening = asyncio.ensure_future(world.open(vbd))
            nodes = {"sector-size": str(block), "feature-max-indirect-segments": str(segments)}
            await backend.connect(dict(nodes))
            with pytest.raises(XvdError, match=f"blocks have {block} bytes, and a request at most"):
                await opening
            backend.close()

    run(work())
