# SPDX-License-Identifier: Apache-2.0
"""Disks whose storage stays as it is, whatever their guests write."""

import asyncio
import random
from pathlib import Path

import pytest
from rig_disk import World, disk_world, opener, run, until

from xvd.backend.settings import Settings
from xvd.engines.layers import cow
from xvd.engines.uri import open_engine, split_layers
from xvd.errors import ConfigError, EngineError
from xvd.frontend.disk import Disk
from xvd.frontend.settings import Settings as FrontSettings

SIZE = 8 << 20


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    path = tmp_path / "golden.img"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


async def scribble(disk: Disk, content: bytearray, seed: int) -> None:
    """Write pieces of every size, several at a time, none over another."""
    draw = random.Random(seed)
    places = draw.sample(range(0, SIZE, 128 << 10), 32)
    for at in places:
        first = at + draw.randrange(64) * 512
        size = draw.choice((512, 1024, 4096, 40 * 512, 64 << 10))
        content[first : first + size] = draw.randbytes(size)
    await asyncio.gather(
        *(disk.write(at, bytes(content[at : at + (128 << 10)])[: 96 << 10]) for at in places[:8]),
        *(write_what_differs(disk, content, at) for at in places[8:]),
    )


async def write_what_differs(disk: Disk, content: bytearray, at: int) -> None:
    found = await disk.read(at, 128 << 10)
    for block in range(0, 128 << 10, 512):
        wanted = content[at + block : at + block + 512]
        if found[block : block + 512] != wanted:
            await disk.write(at + block, bytes(wanted))


@pytest.mark.parametrize("where", ["", ":file={}/over"])
@pytest.mark.parametrize("copying", [False, True])
def test_a_guest_has_what_it_wrote_and_the_image_stays(
    golden: Path, tmp_path: Path, where: str, copying: bool
) -> None:
    before = golden.read_bytes()
    content = bytearray(before)
    uri = f"cow{where.format(tmp_path)}|{golden}"

    async def work() -> None:
        front = FrontSettings(max_queues=2)
        settings = Settings(copying=copying)
        async with (
            disk_world(settings=settings) as world,
            await world.disk(uri, front=front) as disk,
        ):
            for seed in range(3):
                await scribble(disk, content, seed)
                assert await disk.read(0, SIZE) == content
            await disk.flush()

    run(work())

    assert golden.read_bytes() == before


def test_guests_share_an_image_and_each_has_its_own_changes(golden: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with disk_world() as world:
            disks = [await world.disk(f"cow:file={tmp_path}/{n}|{golden}", domid=n) for n in (1, 2)]
            for n, disk in enumerate(disks):
                await disk.write(0, bytes([n]) * 512)
            for n, disk in enumerate(disks):
                assert await disk.read(0, 512) == bytes([n]) * 512
                await disk.close()

    run(work())


async def with_another_backend(world: World, disk: Disk) -> bytes:
    assert world.server is not None
    await disk.write(4096, b"n" * 512)
    await world.server.close()
    await world.serve(opener())
    return bytes(await disk.read(0, 8192))


def test_the_next_backend_has_what_was_written(golden: Path, tmp_path: Path) -> None:
    uri = f"cow:file={tmp_path}/over|{golden}"
    wanted = bytearray(golden.read_bytes()[:8192])
    wanted[4096:4608] = b"n" * 512

    async def work() -> None:
        async with disk_world() as world, await world.disk(uri) as disk:
            assert await with_another_backend(world, disk) == wanted

    run(work())


def test_changes_in_memory_are_not_replaced_by_nothing(golden: Path, expect_log) -> None:
    expect_log("it is not what the guest is connected to")

    async def work() -> None:
        async with disk_world() as world:
            disk = await world.disk(f"cow|{golden}")
            assert world.server is not None
            await disk.write(4096, b"n" * 512)
            await world.server.close()
            await world.serve(opener())
            await until(lambda: expect_log.matching("it is not what the guest is connected to"))
            await disk.close()

    run(work())


def test_changes_of_before_the_host_started_are_forgotten(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"cow:file={tmp_path}/over|{golden}"
    read = [bytearray(512), bytearray(512)]

    for boot, into in (("one", read[0]), ("two", read[1])):
        monkeypatch.setattr(cow, "boot_id", lambda: boot)  # noqa: B023  it is called in this turn
        engine = open_engine(uri)
        engine.read(memoryview(into), 0)
        engine.write(memoryview(b"n" * 512), 0)
        engine.close()

    assert read[0] == read[1] == golden.read_bytes()[:512]


def test_a_file_that_is_in_use_is_refused(golden: Path, tmp_path: Path) -> None:
    uri = f"cow:file={tmp_path}/over|{golden}"
    engine = open_engine(uri)
    try:
        engine.write(memoryview(b"n" * 512), 0)
        with pytest.raises(EngineError):
            open_engine(uri)
        read = bytearray(512)
        engine.read(memoryview(read), 0)
    finally:
        engine.close()

    assert read == b"n" * 512


def test_layers_stand_in_front_of_a_uri() -> None:
    assert split_layers("cow|delay:read=1ms|qcow2:/a|b") == (
        ["cow", "delay:read=1ms"],
        "qcow2:/a|b",
    )
    assert split_layers("/a|b") == ([], "/a|b")
    assert open_engine("readonly|memory:1M").info.read_only
    with pytest.raises(ConfigError, match="from / on"):
        open_engine("cow:file=over|memory:1M")
