# SPDX-License-Identifier: Apache-2.0
"""A disk that gets another size while its guest uses it."""

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rig_disk import World, disk_world, opener, run, until
from rig_guest import RawFrontend, backend_reaches
from rig_queue import rq

from xvd.backend import server as server_module
from xvd.backend.device import Device
from xvd.blkif.abi import Op, Status
from xvd.blkif.messages import Segment
from xvd.engines.uri import open_engine
from xvd.errors import ConfigError, EngineError

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.touch()
    os.truncate(path, 4 * MIB)
    return path


def size_of(image: Path) -> int:
    return image.stat().st_size


async def node_becomes(world: World, path: str, value: str) -> None:
    watch = await world.store.watch(path)
    async for _ in watch:
        if await world.store.read(path) == value:
            break
    await watch.close()


def test_a_larger_disk_is_used_without_a_new_connection(image: Path) -> None:
    async def work() -> None:
        async with disk_world() as world, await world.disk(str(image)) as disk:
            assert world.server is not None
            device = world.server.device("1/51712")
            assert await device.disk.resize(8 * MIB) == 8 * MIB // 512
            await until(lambda: disk.size == 8 * MIB)
            await disk.write(8 * MIB - 4096, b"e" * 4096)
            assert await disk.read(8 * MIB - 4096, 4096) == b"e" * 4096
            assert (size_of(image), disk.connections) == (8 * MIB, 1)

    run(work())


def test_behind_the_end_of_a_smaller_disk_there_is_nothing(image: Path) -> None:
    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach(str(image))
            machine, store = await world.guest()
            frontend = RawFrontend(machine, store, vbd)
            await frontend.publish()
            await backend_reaches(world, vbd, 4)
            assert world.server is not None
            await world.server.device("1/51712").disk.resize(2 * MIB)
            segment = Segment(frontend.pages.grefs[0])
            within = await frontend.ask(rq(Op.READ, 2 * MIB // 512 - 8, segment))
            beyond = await frontend.ask(rq(Op.WRITE, 2 * MIB // 512, segment))
            assert (within.status, beyond.status) == (Status.OKAY, Status.ERROR)
            assert size_of(image) == 2 * MIB
            await node_becomes(world, f"{vbd.backend}/sectors", str(2 * MIB // 512))
            frontend.close()

    run(work())


def test_the_state_is_written_again_so_that_the_frontend_looks(image: Path) -> None:
    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach(str(image))
            machine, store = await world.guest()
            frontend = RawFrontend(machine, store, vbd)
            await frontend.publish()
            await backend_reaches(world, vbd, 4)
            watch = await store.watch(f"{vbd.backend}/state")
            events = aiter(watch)
            await anext(events)
            assert world.server is not None
            await world.server.device("1/51712").disk.resize(8 * MIB)
            await anext(events)
            nodes = [await store.read(f"{vbd.backend}/{name}") for name in ("sectors", "state")]
            assert nodes == [str(8 * MIB // 512), "4"]
            await watch.close()
            frontend.close()

    run(work())


def test_a_file_that_grows_is_followed(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "POLL_S", 0.0)

    async def work() -> None:
        async with disk_world() as world, await world.disk(str(image)) as disk:
            os.truncate(image, 6 * MIB + 100)
            await until(lambda: disk.size == 6 * MIB)

    run(work())


def test_a_guests_own_process_looks_at_sizes_when_it_is_asked_whether_it_lives(
    image: Path,
) -> None:
    async def work() -> None:
        pulse = asyncio.Event()
        async with disk_world(serve=False) as world:
            await world.serve(opener(), pulse=pulse)
            disk = await world.disk(str(image))
            async with disk:
                os.truncate(image, 6 * MIB)
                pulse.set()
                await until(lambda: disk.size == 6 * MIB)

    run(work())


def test_a_disk_that_grew_while_nobody_served_it(image: Path) -> None:
    async def work() -> None:
        async with disk_world() as world, await world.disk(str(image)) as disk:
            assert world.server is not None
            await world.server.close()
            os.truncate(image, 6 * MIB)
            await world.serve(opener())
            await until(lambda: disk.size == 6 * MIB)
            assert disk.connections == 1

    run(work())


def test_a_disk_that_nobody_uses_has_its_new_size_when_somebody_does(image: Path) -> None:
    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach(str(image))
            assert world.server is not None
            await backend_reaches(world, vbd, 2)
            await world.server.device("1/51712").disk.resize(8 * MIB)
            async with await world.open(vbd) as disk:
                assert disk.size == 8 * MIB

    run(work())


@pytest.mark.parametrize("size", [0, 100, 4 * MIB + 1])
def test_a_size_of_broken_blocks_is_refused(image: Path, size: int) -> None:
    engine = open_engine(str(image))
    with pytest.raises(EngineError, match="not whole blocks"):
        engine.resize(size)
    assert engine.measure() == 4 * MIB
    engine.close()


def test_a_read_only_disk_is_not_resized(image: Path) -> None:
    engine = open_engine(str(image), read_only=True)
    with pytest.raises(EngineError) as caught:
        engine.resize(8 * MIB)
    assert caught.value.errno == errno.EROFS
    engine.close()


def test_storage_of_one_size_says_so_and_nothing_changes() -> None:
    async def work() -> None:
        async with disk_world() as world, await world.disk("memory:1M") as disk:
            assert world.server is not None
            with pytest.raises(EngineError, match="the size that it has"):
                await world.server.device("1/51712").disk.resize(512 * 1024)
            await disk.write(MIB - 512, b"w" * 512)

    run(work())


def test_a_disk_is_found_by_its_name_and_no_other(image: Path) -> None:
    async def work() -> None:
        async with disk_world() as world, await world.disk(str(image)):
            server = world.server
            assert server is not None
            device: Callable[[str], Device] = server.device
            assert device("1/51712") is device("backend/vbd/1/51712")
            for name in ("51712x", "2/51712", "", "1712"):
                with pytest.raises(ConfigError, match="names no disk"):
                    device(name)

    run(work())


def test_requests_under_way_while_the_size_changes_are_all_answered(image: Path) -> None:
    async def work() -> None:
        async with disk_world() as world, await world.disk(str(image)) as disk:
            assert world.server is not None
            device = world.server.device("1/51712")
            for turn in range(10):
                writes = [disk.write(n * 4096, bytes([turn]) * 4096) for n in range(64)]
                size = (4 + turn % 3) * MIB
                await asyncio.gather(*writes, device.disk.resize(size))
                await until(lambda size=size: disk.size == size)

    run(work())


def test_many_who_resize_and_look_at_once_leave_one_size(image: Path) -> None:
    """A poll that came between a smaller size and the cut would have let writes in behind it."""

    async def work() -> None:
        async with disk_world() as world, await world.disk(str(image)) as disk:
            assert world.server is not None
            device = world.server.device("1/51712")
            sizes = [(2 + n % 4) * MIB for n in range(20)]
            await asyncio.gather(*(device.disk.resize(size) for size in sizes),
                                 *(device.disk.follow_size() for _ in sizes))  # fmt: skip
            await until(lambda: disk.size == size_of(image) == sizes[-1])

    run(work())


def test_many_disks_are_asked_for_their_sizes_more_rarely() -> None:
    assert [server_module.rarity(disks) for disks in (0, 30, 60, 180, 2000)] == [1, 1, 2, 6, 6]
