# SPDX-License-Identifier: Apache-2.0
"""Disks that wait for storage that is away (`on_error=hold`)."""

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from rig_disk import World, disk_world, run, until
from rig_engines import PythonEngine

from xvd.backend import hold
from xvd.backend.device import Device
from xvd.backend.settings import Settings
from xvd.blkif.assignment import BackendAssignment
from xvd.engines.interface import Engine
from xvd.frontend.disk import Disk
from xvd.frontend.settings import Settings as FrontSettings

HOLDING = Settings(on_error="hold")
ERROR = "/local/domain/0/error/backend/vbd/1/51712/error"


class Outage(PythonEngine):
    """Storage that fails while `away` is an errno."""

    def __init__(self) -> None:
        super().__init__(8 << 20)
        self.away = 0
        self.failed = 0

    def _check(self) -> None:
        if self.away:
            self.failed += 1
            raise OSError(self.away, "away")

    def read(self, buffer: memoryview, offset: int) -> None:
        self._check()
        super().read(buffer, offset)

    def write(self, buffer: memoryview, offset: int) -> None:
        self._check()
        super().write(buffer, offset)

    def flush(self) -> None:
        self._check()
        super().flush()


@asynccontextmanager
async def held_world(
    engine: Outage, settings: Settings = HOLDING
) -> AsyncIterator[tuple[World, Disk, Device]]:
    async def open_storage(_: BackendAssignment) -> Engine:
        return engine

    async with (
        disk_world(open_storage=open_storage, settings=settings) as world,
        await world.disk(front=FrontSettings(max_queues=2)) as disk,
    ):
        assert world.server is not None
        yield world, disk, world.server.device("1/51712")


@pytest.fixture(autouse=True)
def short_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hold, "FIRST_S", 0.005)
    monkeypatch.setattr(hold, "MOST_S", 0.02)


def test_a_guest_sees_a_delay_and_no_error(expect_log) -> None:
    async def work() -> None:
        engine = Outage()
        async with held_world(engine) as (world, disk, device):
            await disk.write(0, b"before".ljust(512, b"."))
            engine.away = errno.EIO
            doing = [
                asyncio.ensure_future(it)
                for it in (disk.write(512, b"w" * 512), disk.flush(), disk.read(0, 512))
            ]
            await until(lambda: engine.failed > 6)
            assert not any(it.done() for it in doing)
            assert device.hold.why.startswith("held until its storage is back (EIO, ")
            assert await world.store.try_read(ERROR) == device.hold.why
            engine.away = 0
            await asyncio.gather(*doing)
            assert doing[2].result() == b"before".ljust(512, b".")
            await until(lambda: not device.hold.why)
            assert not await world.store.exists("/local/domain/0/error")
        assert engine.data[512:1024] == b"w" * 512

    expect_log("held until its storage is back")
    expect_log("its storage is back after 0 s")
    run(work())


def test_it_is_told_once(expect_log) -> None:
    async def work() -> None:
        engine = Outage()
        async with held_world(engine) as (_, disk, device):
            engine.away = errno.ENOSPC
            writing = asyncio.ensure_future(disk.write(0, b"w" * 512))
            await until(lambda: engine.failed > 5)
            engine.away = errno.ESHUTDOWN
            await until(lambda: engine.failed > 10)
            engine.away = 0
            await writing
            await until(lambda: not device.hold.why)

    expect_log("free some space where the image lies")
    expect_log("its storage is back")
    run(work())
    assert len(expect_log.lines) == 2


def test_errors_are_the_guests_unless_it_is_set(expect_log) -> None:
    async def work() -> None:
        engine = Outage()
        async with held_world(engine, Settings()) as (_, disk, _device):
            engine.away = errno.EIO
            with pytest.raises(OSError, match="Input/output error"):
                await disk.read(0, 512)
            engine.away = 0

    expect_log("the guest sees I/O errors")
    run(work())


def test_it_may_be_set_while_the_guest_runs(expect_log) -> None:
    async def work() -> None:
        engine = Outage()
        async with held_world(engine, Settings()) as (world, disk, device):
            assert world.server is not None
            world.server.change(["on_error=hold"], "1/51712")
            engine.away = errno.ETIMEDOUT
            reading = asyncio.ensure_future(disk.read(0, 512))
            await until(lambda: engine.failed > 2)
            engine.away = 0
            assert await reading == bytes(512)
            await until(lambda: not device.hold.why)

    expect_log("ETIMEDOUT")
    expect_log("its storage is back")
    run(work())


def test_other_storage_ends_a_hold(expect_log) -> None:
    async def work() -> None:
        engines = [Outage(), Outage()]

        async def open_storage(assignment: BackendAssignment) -> Engine:
            return engines[assignment.image == "other"]

        async with (
            disk_world(open_storage=open_storage, settings=HOLDING) as world,
            await world.disk() as disk,
        ):
            engines[0].away = errno.ENOTCONN
            writing = asyncio.ensure_future(disk.write(0, b"w" * 512))
            await until(lambda: engines[0].failed > 1)
            assert world.server is not None
            device = world.server.device("1/51712")
            await device.life.swap("other", 10)
            await writing
            await until(lambda: not device.hold.why)
        assert engines[1].data[:512] == b"w" * 512

    expect_log("ENOTCONN")
    expect_log("its storage is back")
    run(work())


def test_a_held_disk_that_is_paused_is_left_alone(expect_log) -> None:
    async def work() -> None:
        engine = Outage()
        async with held_world(engine) as (_, disk, device):
            engine.away = errno.EIO
            reading = asyncio.ensure_future(disk.read(0, 512))
            await until(lambda: engine.failed > 1)
            await device.life.pause(10)
            failed = engine.failed
            await asyncio.sleep(0.05)
            assert (engine.failed, reading.done()) == (failed, False)
            engine.away = 0
            await device.life.resume()
            assert await reading == bytes(512)
            await until(lambda: not device.hold.why)

    expect_log("EIO")
    expect_log("its storage is back")
    run(work())
