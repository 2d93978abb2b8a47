# SPDX-License-Identifier: Apache-2.0
"""A disk whose storage hangs, and that goes on with other storage."""

import asyncio
import contextlib
import errno
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from rig_disk import World, disk_world, opener, run, until
from rig_engines import PythonEngine

from xvd.backend.device import Device, StorageOpener
from xvd.blkif.assignment import BackendAssignment
from xvd.engines.image import FileEngine
from xvd.engines.interface import Engine, EngineInfo, ThreadModel
from xvd.errors import ConfigError, EngineError
from xvd.frontend.settings import Settings as FrontSettings

SIZE = 1 << 20


class Hanging(PythonEngine):
    """Storage whose operations end when `lives` is set, with an L in every byte that is read."""

    def __init__(self, *, pins_pages: bool = False) -> None:
        super().__init__(SIZE, ThreadModel.PARALLEL)
        self.lives = threading.Event()
        self.asked = 0
        self.gone = threading.Event()
        self._pins_pages = pins_pages

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            size=SIZE, can_discard=True, pins_pages=self._pins_pages,
            thread_model=ThreadModel.PARALLEL,
        )  # fmt: skip

    def read(self, buffer: memoryview, offset: int) -> None:
        self.asked += 1
        self.lives.wait()
        buffer[:] = b"L" * len(buffer)

    def write(self, buffer: memoryview, offset: int) -> None:
        self.asked += 1
        self.lives.wait()

    def close(self) -> None:
        super().close()
        self.gone.set()


@pytest.fixture
def hanging() -> Hanging:
    return Hanging()


def opener_of(hanging: Hanging) -> StorageOpener:
    async def open_storage(assignment: BackendAssignment) -> Engine:
        if assignment.image == "hanging":
            return hanging
        return await opener()(assignment)

    return open_storage


def run_beside(hanging: Hanging, work: Coroutine[Any, Any, None]) -> None:
    """Run a test whose failure is not to wait for what hangs."""

    async def until_it_ends() -> None:
        try:
            await work
        finally:
            hanging.lives.set()

    run(until_it_ends())


def device(world: World) -> Device:
    assert world.server is not None
    return world.server.device("1/51712")


@pytest.mark.parametrize("queues", [1, 4])
@pytest.mark.parametrize("persistent", [True, False], ids=["persistent", "mapped"])
def test_what_hanging_storage_has_is_done_by_other_storage(
    hanging: Hanging, expect_log: Callable[[str], None], queues: int, persistent: bool
) -> None:
    async def work() -> None:
        front = FrontSettings(max_queues=queues, feature_persistent=persistent)
        async with (
            disk_world(open_storage=opener_of(hanging)) as world,
            await world.disk("hanging", front=front) as disk,
        ):
            reads = [asyncio.ensure_future(disk.read(i * 4096, 4096)) for i in range(8)]
            write = asyncio.ensure_future(disk.write(1 << 16, b"w" * 4096))
            await until(lambda: hanging.asked >= 1)

            await device(world).life.swap("memory:1M", 5, abandon=True)

            assert await asyncio.gather(*reads) == [bytes(4096)] * 8
            await write
            hanging.lives.set()
            await until(hanging.gone.is_set)
            assert await disk.read(1 << 16, 4096) == b"w" * 4096
            counters = device(world).disk.counters()
            assert (counters.requests, counters.in_flight) == (counters.responses, 0)

    expect_log("the old one was left with what it had")
    run_beside(hanging, work())


def test_storage_that_pins_pages_is_not_abandoned_while_it_reads() -> None:
    hanging = Hanging(pins_pages=True)

    async def work() -> None:
        async with (
            disk_world(open_storage=opener_of(hanging)) as world,
            await world.disk("hanging") as disk,
        ):
            reading = asyncio.ensure_future(disk.read(0, 4096))
            await until(lambda: hanging.asked == 1)

            with pytest.raises(ConfigError, match=r"reads of it by direct I/O .* --copy has none"):
                await device(world).life.swap("memory:1M", 5, abandon=True)

            hanging.lives.set()
            assert await reading == b"L" * 4096

    run_beside(hanging, work())


def test_storage_that_does_not_fit_is_not_exchanged_for_what_hangs(hanging: Hanging) -> None:
    async def work() -> None:
        async with (
            disk_world(open_storage=opener_of(hanging)) as world,
            await world.disk("hanging") as disk,
        ):
            reading = asyncio.ensure_future(disk.read(0, 4096))
            await until(lambda: hanging.asked == 1)

            with pytest.raises(ConfigError, match="does not fit"):
                await device(world).life.swap("memory:4K", 5, abandon=True)

            hanging.lives.set()
            assert await reading == b"L" * 4096

    run_beside(hanging, work())


def test_a_disk_that_nobody_uses_leaves_its_storage_too(
    hanging: Hanging, expect_log: Callable[[str], None]
) -> None:
    async def work() -> None:
        async with disk_world(open_storage=opener_of(hanging)) as world:
            await world.attach("hanging")
            await device(world).life.swap("memory:1M", 5, abandon=True)
            await until(hanging.gone.is_set)

    expect_log("the old one was left with what it had")
    run_beside(hanging, work())


def test_a_guest_leaves_a_disk_whose_old_storage_still_hangs(
    hanging: Hanging, expect_log: Callable[[str], None]
) -> None:
    async def work() -> None:
        async with disk_world(open_storage=opener_of(hanging)) as world:
            async with await world.disk("hanging") as disk:
                reading = asyncio.ensure_future(disk.read(0, 4096))
                await until(lambda: hanging.asked == 1)
                await device(world).life.swap("memory:1M", 5, abandon=True)
                await reading
            hanging.lives.set()
            await until(hanging.gone.is_set)

    expect_log("the old one was left with what it had")
    run_beside(hanging, work())


def test_what_is_tried_again_without_end_is_left_too(
    tmp_path: Path, expect_log: Callable[[str], None]
) -> None:
    class Away(PythonEngine):
        def write(self, buffer: memoryview, offset: int) -> None:
            raise EngineError(errno.EIO, "away")

    async def open_storage(assignment: BackendAssignment) -> Engine:
        return Away(SIZE) if assignment.image == "away" else FileEngine(tmp_path / "image")

    (tmp_path / "image").write_bytes(bytes(SIZE))

    async def work() -> None:
        async with (
            disk_world(open_storage=open_storage) as world,
            await world.disk("away") as disk,
        ):
            assert world.server is not None
            world.server.change(["on_error=hold"])
            writing = asyncio.ensure_future(disk.write(0, b"w" * 4096))
            await until(lambda: bool(device(world).hold.why))

            await device(world).life.swap("image", 5, abandon=True)

            await writing
        with contextlib.closing(FileEngine(tmp_path / "image")) as image:
            found = bytearray(4096)
            image.read(memoryview(found), 0)
        assert found == b"w" * 4096

    expect_log("the old one was left with what it had")
    expect_log("held until its storage is back")
    run(work())
