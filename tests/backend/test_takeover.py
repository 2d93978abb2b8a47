# SPDX-License-Identifier: Apache-2.0
"""A backend ends, another takes over, and the guest's user does what it likes meanwhile."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rig_disk import World, disk_world, opener, run, until
from rig_guest import backend_error, backend_reaches, connected
from rig_queue import rq
from served_disk import rigged_disk

from xvd.blkif.abi import Op
from xvd.blkif.handshake import BackendState
from xvd.blkif.messages import Segment
from xvd.engines.image import FileEngine
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


def test_a_disk_may_be_closed_while_a_successor_takes_over(image: Path) -> None:
    # The frontend waited for answers from a backend that, seeing it close, had not taken up the
    # ring at all: both waited for ever.
    async def scenario() -> None:
        async with rigged_disk(str(image)) as rig:
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


def the_state(world: World) -> BackendState | None:
    assert world.server is not None
    return next((device.state for device in world.server.devices.values()), None)


def another_of_the_same_name(image: Path) -> None:
    """What an editor or a copying tool does: a new file takes the old one's name."""
    new = image.with_name("new.img")
    new.touch()
    os.truncate(new, 4 << 20)
    new.rename(image)


def test_a_successor_does_not_serve_another_file_of_the_same_name(
    image: Path, expect_log: Callable[[str], None]
) -> None:
    expect_log("it is not what the guest is connected to")

    async def work() -> None:
        async with disk_world() as world:
            frontend, vbd = await connected(world, str(image))
            assert world.server is not None
            await world.server.close()
            another_of_the_same_name(image)
            for _ in range(2):  # nor does the one after it, whatever the nodes say by then
                await world.serve(opener())
                await until(
                    lambda: the_state(world) in (BackendState.LOST, BackendState.NO_STORAGE)
                )
                assert "put the other one back" in await backend_error(world, vbd)
                await world.server.close()
            frontend.close()

    run(work())


def test_a_frontend_that_left_meanwhile_may_have_another_file(image: Path) -> None:
    async def work() -> None:
        async with disk_world() as world:
            frontend, vbd = await connected(world, str(image))
            assert world.server is not None
            await world.server.close()
            await frontend.write({"state": "1"})
            another_of_the_same_name(image)
            await world.serve(opener())
            await backend_reaches(world, vbd, 2)
            frontend.close()

    run(work())


def test_a_ring_that_took_anothers_place_gets_none_of_its_requests(
    image: Path, expect_log: Callable[[str], None]
) -> None:
    """A guest starts over while nobody serves it, and gets the same references and port again."""
    expect_log("is set aside: it is of another ring")

    async def work() -> None:
        async with disk_world() as world:
            frontend, _ = await connected(world, str(image))
            page = frontend.pages
            page.view[:BLOCK] = b"1" * BLOCK
            assert world.server is not None
            write = rq(Op.WRITE, 0, Segment(page.grefs[0]), id=9)
            assert (await frontend.ask(write)).status == 0
            await world.server.close()
            frontend.ring.init()
            await world.serve(opener())
            await until(lambda: the_state(world) is BackendState.CONNECTED)
            answer = await frontend.ask(rq(Op.READ, 0, Segment(page.grefs[1]), id=10))
            assert (answer.id, frontend.ring.outstanding()) == (10, 0)
            frontend.close()

    run(work())


def test_a_successor_waits_for_an_image_that_somebody_else_has(
    image: Path, expect_log: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    expect_log("waits for its storage: .*the image is in use")
    monkeypatch.setattr("xvd.backend.device.BUSY_S", 0.01)
    opened: list[FileEngine] = []

    async def scenario() -> None:
        async with rigged_disk(str(image)) as rig:
            await rig.disk.write(0, bytes(BLOCK))
            await rig.restart_backend(between=lambda: opened.append(FileEngine(str(image))))
            writing = asyncio.ensure_future(rig.disk.write(0, b"1" * BLOCK))
            await asyncio.wait([writing], timeout=0.05)
            assert not writing.done()
            opened[0].close()
            await writing
            assert await rig.disk.read(0, BLOCK) == b"1" * BLOCK
            assert rig.disk.connections == 1

    asyncio.run(scenario())
