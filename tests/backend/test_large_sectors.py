# SPDX-License-Identifier: Apache-2.0
"""Disks of 4096-byte sectors: the dialect of drivers that count in them, where it is allowed."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from rig_disk import disk_world, run
from rig_front import FrontWorld
from rig_guest import RawFrontend, backend_error, backend_reaches
from rig_queue import ALL, QueueWorld, discard, rq

from xvd.backend.settings import Settings
from xvd.blkif.abi import Op, Status
from xvd.blkif.assignment import BackendAssignment
from xvd.blkif.features import parse_backend, wire_sector_of
from xvd.blkif.messages import DiscardRequest, IndirectRequest, Request, Segment
from xvd.engines.checked import Checked
from xvd.engines.interface import Engine, EngineInfo
from xvd.engines.memory import MemoryEngine
from xvd.errors import PeerProtocolError
from xvd.frontend.settings import Settings as FrontSettings

SIZE = 8 << 20


class FourKn(MemoryEngine):
    """A disk of 4096-byte blocks."""

    def __init__(self) -> None:
        super().__init__(SIZE)

    @property
    def info(self) -> EngineInfo:
        return replace(super().info, logical_block_size=4096, physical_block_size=4096)


@pytest.fixture
def world() -> Iterator[QueueWorld]:
    engine = Checked(FourKn())
    with QueueWorld(
        engine, block_sectors=8, wire_sector=8, offered=ALL, indirect_max=32
    ) as queue_world:
        yield queue_world


# ---- The backend's queue ----


def test_a_sector_on_the_ring_is_a_block(world: QueueWorld) -> None:
    world.data(0)[:] = b"a" * 4096
    world.data(1)[:] = b"b" * 4096
    [answer] = world.ask(
        rq(Op.WRITE, 3, Segment(world.pages.grefs[0], 0, 0), Segment(world.pages.grefs[1], 0, 0))
    )
    assert answer.status == Status.OKAY
    buffer = bytearray(4 * 4096)
    world.engine.read(memoryview(buffer), 2 * 4096)
    assert buffer == bytes(4096) + b"a" * 4096 + b"b" * 4096 + bytes(4096)


def test_an_indirect_request_counts_in_blocks_too(world: QueueWorld) -> None:
    segments = [Segment(world.pages.grefs[page], 0, 0) for page in range(12)]
    for page in range(12):
        world.data(page)[:] = bytes([page + 1]) * 4096
    [answer] = world.ask(world.indirect(Op.WRITE, 5, segments))
    assert answer.status == Status.OKAY
    buffer = bytearray(12 * 4096)
    world.engine.read(memoryview(buffer), 5 * 4096)
    assert buffer == b"".join(bytes([page + 1]) * 4096 for page in range(12))


def test_a_discard_counts_in_blocks_too(world: QueueWorld) -> None:
    world.engine.write(memoryview(bytearray(b"d" * 16384)), 0)
    [answer] = world.ask(discard(1, 2))
    assert answer.status == Status.OKAY
    buffer = bytearray(16384)
    world.engine.read(memoryview(buffer), 0)
    assert buffer == b"d" * 4096 + bytes(8192) + b"d" * 4096


@pytest.mark.parametrize("sector", [SIZE // 4096, 2**61, 2**61 + 1, 2**64 - 1])
def test_what_would_wrap_is_out_of_range(world: QueueWorld, sector: int) -> None:
    answers = world.ask(
        rq(Op.READ, sector, Segment(world.pages.grefs[0], 0, 0)),
        discard(sector, 1),
        discard(0, min(sector + 1, 2**64 - 1)),
    )
    assert [answer.status for answer in answers] == [Status.ERROR] * 3
    assert world.queue.counters()["refusals"] == {"out_of_range": 3}


def test_a_segment_has_no_second_block(world: QueueWorld) -> None:
    for first, last in ((0, 1), (1, 1), (0, 31), (0, 255)):
        [answer] = world.ask(rq(Op.READ, 0, Segment(world.pages.grefs[0], first, last)))
        assert answer.status == Status.ERROR
    assert world.queue.counters()["refusals"] == {"segment_past_page": 4}


# ---- The frontend's queue ----


def test_the_frontend_counts_in_blocks() -> None:
    with FrontWorld(block_sectors=8, wire_sector=8, segments_max=32) as world:
        world.queue.submit(Op.WRITE, 16, 24, bytes(24 * 512), 1)
        world.queue.submit(Op.READ, 800, 12 * 8, bytearray(12 * 4096), 2)
        world.queue.submit(Op.DISCARD, 80, 16, None, 3)
        write, read, forget = world.requests()

        assert isinstance(write, Request)
        assert write.sector_number == 2
        assert [(s.first_sect, s.last_sect) for s in write.segments] == [(0, 0)] * 3
        assert isinstance(read, IndirectRequest)
        assert read.sector_number == 100
        assert [(s.first_sect, s.last_sect) for s in world.segments(read)] == [(0, 0)] * 12
        assert isinstance(forget, DiscardRequest)
        assert (forget.sector_number, forget.nr_sectors) == (10, 2)


# ---- Both ends ----


async def open_4kn(_: BackendAssignment) -> Engine:
    return Checked(FourKn())


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("copying", [True, False])
def test_data_lies_where_it_belongs_in_either_dialect(both: bool, copying: bool) -> None:
    async def work() -> None:
        settings = Settings(large_sectors=True, copying=copying)
        front = FrontSettings(large_sectors=both)
        async with disk_world(open_storage=open_4kn, settings=settings) as world:
            async with await world.disk(front=front) as disk:
                assert (disk.size, disk.logical_block_size) == (SIZE, 4096)
                sectors = await world.store.read("backend/vbd/1/51712/sectors")
                assert int(sectors) == SIZE // (4096 if both else 512)
                await disk.write(4096, b"x" * 300_000)
                await disk.write(1000, b"edge")
                await disk.discard(4096, 8192)
                await disk.flush()
                assert world.server is not None
                engine = world.server.device("1/51712").disk.engine
                assert engine is not None
                buffer = bytearray(SIZE)
                engine.read(memoryview(buffer), 0)
                wanted = bytearray(4096 + 300_000)
                wanted[4096:] = b"x" * 300_000
                wanted[1000:1004] = b"edge"
                wanted[4096 : 4096 + 8192] = bytes(8192)
                assert buffer == wanted + bytes(SIZE - len(wanted))
                assert await disk.read(0, len(wanted)) == wanted

    run(work())


def test_another_size_is_told_in_the_same_unit() -> None:
    async def work() -> None:
        settings = Settings(large_sectors=True)
        front = FrontSettings(large_sectors=True)
        async with disk_world(open_storage=open_4kn, settings=settings) as world:
            async with await world.disk(front=front) as disk:
                assert world.server is not None
                device = world.server.device("1/51712")
                device.disk.storage._accept(SIZE // 1024)
                while disk.size != SIZE // 2:
                    await world.store.exists("backend")
                sectors = await world.store.read("backend/vbd/1/51712/sectors")
                assert int(sectors) == SIZE // 8192

    run(work())


def test_a_successor_goes_on_in_the_same_unit() -> None:
    async def work() -> None:
        engine = Checked(FourKn())

        async def share(_: BackendAssignment) -> Engine:
            return engine

        settings = Settings(large_sectors=True)
        async with disk_world(open_storage=share, settings=settings) as world:
            async with await world.disk(front=FrontSettings(large_sectors=True)) as disk:
                await disk.write(8192, b"1" * 4096)
                assert world.server is not None
                await world.server.close()
                await world.serve(share, settings)
                assert await disk.read(8192, 4096) == b"1" * 4096
                assert disk.size == SIZE

    run(work())


def test_by_default_such_a_frontend_is_refused(expect_log) -> None:
    expect_log("feature-large-sector-size is 1")

    async def work() -> None:
        async with disk_world(open_storage=open_4kn) as world:
            vbd = await world.attach()
            machine, store = await world.guest()
            frontend = RawFrontend(machine, store, vbd)
            await store.write(f"{vbd.frontend}/feature-large-sector-size", "1")
            await frontend.publish()
            await backend_reaches(world, vbd, 6)
            assert "set large_sectors=1" in await backend_error(world, vbd)
            frontend.close()

    run(work())


def test_a_sector_of_more_than_a_page_cannot_be_counted_in() -> None:
    assert wire_sector_of(4096) == 8
    nodes = {"sectors": "8", "info": "0", "sector-size": "8192"}
    with pytest.raises(PeerProtocolError, match="no page holds a sector"):
        parse_backend(nodes, large_sectors=True)
