# SPDX-License-Identifier: Apache-2.0
"""Another backend comes while operations are in flight, and it can do less, or more."""

import asyncio
import errno
import random
from dataclasses import replace

import pytest
from rig_backend import BARE, RICH, ModelBackend, model_disk, operation_of
from rig_disk import World, disk_world, run, until

from xvd.blkif.abi import Op
from xvd.blkif.features import BackendFeatures
from xvd.blkif.messages import IndirectRequest
from xvd.machine.emulated.limits import Limits
from xvd.toolstack.vbd import Vbd
from xvd.types import Domid

LARGE = Limits(pages=32768, grefs=16384, tracks=16384, ports=64)
SMALLER = {
    "nothing": BARE,
    "smaller requests": replace(RICH, max_indirect_segments=12),
    "no descriptors": replace(RICH, max_indirect_segments=0),
    "one queue": replace(RICH, max_queues=1),
    "a small ring": replace(RICH, max_ring_page_order=0),
    "fleeting grants": replace(RICH, persistent=False),
    "larger blocks": replace(RICH, sector_size=4096, physical_sector_size=4096),
}


@pytest.mark.parametrize("first", [RICH, BARE], ids=["rich", "bare"])
@pytest.mark.parametrize("second", [RICH, *SMALLER.values()], ids=["everything", *SMALLER])
def test_what_is_in_flight_goes_to_the_next_backend(
    first: BackendFeatures, second: BackendFeatures
) -> None:
    async def work() -> None:
        async with disk_world(serve=False, limits=LARGE) as world:
            async with model_disk(world, first, max_queues=4, max_ring_page_order=2) as (
                disk,
                backend,
            ):
                draw = random.Random(5)
                pieces = [(i * 131072 + 512 * i, draw.randbytes(100 * 512)) for i in range(16)]
                backend.paused = True
                writes = [asyncio.ensure_future(disk.write(at, data)) for at, data in pieces]
                reads = [asyncio.ensure_future(disk.read(at + 3_000_000, 777)) for at in (1, 9999)]
                await until(lambda: len(backend.seen) >= 10)
                backend.paused = False
                await backend.come_back(second)
                await asyncio.gather(*writes)
                assert await asyncio.gather(*reads) == [bytes(777)] * 2
                for at, data in pieces:
                    assert backend.storage[at : at + len(data)] == data
                    assert await disk.read(at, len(data)) == data
                assert disk.connections == 2

    run(work())


def test_a_request_is_cut_anew_by_the_next_ones_limits() -> None:
    async def work() -> None:
        async with disk_world(serve=False, limits=LARGE) as world:
            async with model_disk(world, RICH, max_queues=1) as (disk, backend):
                backend.paused = True
                writing = asyncio.ensure_future(disk.write(0, bytes(128 * 1024)))
                await until(lambda: len(backend.seen) == 1)
                assert isinstance(backend.seen[0], IndirectRequest)
                backend.seen.clear()
                backend.paused = False
                await backend.come_back(BARE)
                await writing
                assert [len(request.segments) for request in backend.seen] == [11, 11, 10]  # type: ignore[union-attr]

    run(work())


def test_a_flush_that_the_next_backend_does_not_know_is_a_success(expect_log) -> None:
    expect_log("the backend has withdrawn flush")

    async def work() -> None:
        async with disk_world(serve=False) as world:
            async with model_disk(world, replace(RICH, barrier=False)) as (disk, backend):
                backend.paused = True
                flushing = asyncio.ensure_future(disk.flush())
                await until(lambda: len(backend.seen) == 1)
                await backend.come_back(BARE)
                await flushing
                assert not disk.can_flush

    run(work())


def test_a_flush_becomes_a_barrier_where_the_next_backend_has_only_that(expect_log) -> None:
    expect_log("the backend has withdrawn flush")

    async def work() -> None:
        async with disk_world(serve=False) as world:
            async with model_disk(world, RICH) as (disk, backend):
                backend.paused = True
                flushing = asyncio.ensure_future(disk.flush())
                await until(lambda: len(backend.seen) == 1)
                backend.paused = False
                await backend.come_back(replace(BARE, barrier=True))
                await flushing
                assert [operation_of(request) for request in backend.seen] == [3, 2]

    run(work())


def test_a_forced_write_is_written_and_flushed_by_the_next_backend(expect_log) -> None:
    expect_log("the backend has withdrawn barriers")

    async def work() -> None:
        async with disk_world(serve=False) as world:
            async with model_disk(world, RICH) as (disk, backend):
                backend.paused = True
                writing = asyncio.ensure_future(disk.write(0, b"f" * 512, fua=True))
                await until(lambda: len(backend.seen) == 1)
                backend.paused = False
                await backend.come_back(replace(BARE, flush=True))
                await writing
                assert [operation_of(request) for request in backend.seen] == [2, 1, 3]
                assert backend.storage[:512] == b"f" * 512

    run(work())


def test_a_discard_that_the_next_backend_does_not_know_is_an_error(expect_log) -> None:
    expect_log("the backend has withdrawn discard")

    async def work() -> None:
        async with disk_world(serve=False) as world:
            async with model_disk(world, RICH) as (disk, backend):
                backend.paused = True
                discarding = asyncio.ensure_future(disk.discard(0, 4096))
                await until(lambda: len(backend.seen) == 1)
                await backend.come_back(BARE)
                with pytest.raises(OSError, match="DISCARD of 8 sectors") as caught:
                    await discarding
                assert caught.value.errno == errno.EOPNOTSUPP

    run(work())


def test_operations_keep_their_order_from_one_backend_to_the_next() -> None:
    """A write that was waited for is not overtaken by the flush that came after it."""

    async def work() -> None:
        async with disk_world(serve=False) as world:
            async with model_disk(world, RICH, max_queues=1) as (disk, backend):
                await disk.write(0, b"1" * 512)
                backend.paused = True
                later = [
                    asyncio.ensure_future(disk.flush()),
                    asyncio.ensure_future(disk.write(8192, b"2" * 512)),
                    asyncio.ensure_future(disk.flush()),
                ]
                await until(lambda: len(backend.seen) == 4)
                backend.seen.clear()
                backend.paused = False
                await backend.come_back()
                await asyncio.gather(*later)
                flush, write = Op.FLUSH_DISKCACHE, Op.WRITE
                assert [operation_of(request) for request in backend.seen] == [flush, write, flush]

    run(work())


async def move_to(world: World, vbd: Vbd, domid: Domid) -> Vbd:
    """What a toolstack does at a migration: the disk's backend is another one from now on."""
    moved = replace(vbd, backend_domid=domid)
    await world.store.mkdir(moved.backend)
    await world.store.set_perms(moved.backend, [f"n{domid}", f"r{vbd.domid}"])
    for name in ("frontend", "frontend-id", "online"):
        value = await world.store.read(f"{vbd.backend}/{name}")
        await world.store.write(f"{moved.backend}/{name}", value)
    await world.store.write(f"{moved.backend}/state", "1")
    await world.store.write(f"{vbd.frontend}/backend", moved.backend)
    await world.store.write(f"{vbd.frontend}/backend-id", str(domid))
    await world.store.write(f"{vbd.frontend}/state", "1")
    return moved


@pytest.mark.parametrize("second", [RICH, BARE], ids=["rich", "bare"])
def test_a_disk_goes_on_where_its_domain_was_moved_to(second: BackendFeatures) -> None:
    async def work() -> None:
        async with disk_world(serve=False, limits=LARGE) as world:
            async with model_disk(world, RICH) as (disk, backend):
                machine, _ = await world.guest(2)
                await disk.write(0, b"before" * 100)
                backend.paused = True
                writing = asyncio.ensure_future(disk.write(1000, b"during" * 20_000))
                await until(lambda: len(backend.seen) > 3)
                moved = await move_to(world, backend.vbd, Domid(2))
                there = ModelBackend(world, moved, second, machine)
                there.storage[:600] = backend.storage[:600]
                disk.resume()
                await there.connect()
                await writing
                assert there.storage[:600] == b"before" * 100
                assert await disk.read(1000, 120_000) == b"during" * 20_000
                await disk._leave(abandon=True)
                await there.close()

    run(work())


def test_a_disk_that_is_resized_is_read_and_written_to_its_new_end() -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world, model_disk(world) as (disk, backend):
            assert disk.size == 8192 * 512
            await backend.resize(16384)
            await until(lambda: disk.size == 16384 * 512)
            await disk.write(disk.size - 10, b"0123456789")
            assert backend.storage[-10:] == b"0123456789"
            await backend.resize(4096)
            await until(lambda: disk.size == 4096 * 512)
            with pytest.raises(OSError, match="are not on a disk of 2097152 bytes"):
                await disk.read(4096 * 512, 1)

    run(work())
