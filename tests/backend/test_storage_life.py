# SPDX-License-Identifier: Apache-2.0
"""Disks that are paused, resumed, and given other storage while their guests use them."""

import asyncio
import errno
from collections.abc import Sequence
from pathlib import Path

import pytest
from rig_disk import World, disk_world, opener, run
from rig_engines import PythonEngine

from xvd.backend.device import Device
from xvd.backend.life import unmet
from xvd.backend.state import DiskState
from xvd.blkif.abi import InfoFlag
from xvd.blkif.assignment import BackendAssignment
from xvd.blkif.features import BackendFeatures
from xvd.engines.interface import Engine, EngineInfo
from xvd.errors import BudgetError, ConfigError, EngineError
from xvd.frontend.disk import Disk
from xvd.frontend.settings import Settings as FrontSettings
from xvd.toolstack.vbd import detach

FOUR_QUEUES = FrontSettings(max_queues=4)


def device(world: World, name: str = "1/51712") -> Device:
    assert world.server is not None
    return world.server.device(name)


def image(path: Path, fill: bytes, size: int = 8 << 20) -> Path:
    path.write_bytes(fill * size)
    return path


async def waits_until_it_is_resumed(world: World, disk: Disk) -> None:
    reading = asyncio.ensure_future(disk.read(0, 4096))
    done, _ = await asyncio.wait([reading], timeout=0.05)
    assert not done
    await device(world).life.resume()
    assert await reading == bytes(4096)


def test_a_paused_disk_answers_when_it_is_resumed() -> None:
    async def work() -> None:
        async with disk_world() as world, await world.disk(front=FOUR_QUEUES) as disk:
            await device(world).life.pause(10)
            await waits_until_it_is_resumed(world, disk)

    run(work())


def test_a_frontend_that_connects_to_a_paused_disk_waits() -> None:
    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach()
            await device(world).life.pause(10)
            async with await world.open(vbd) as disk:
                await waits_until_it_is_resumed(world, disk)

    run(work())


def test_a_paused_disk_stays_paused_with_the_next_backend(tmp_path: Path) -> None:
    async def work() -> None:
        one = image(tmp_path / "a", b"a")
        async with disk_world() as world, await world.disk(str(one)) as disk:
            await device(world).life.pause(10)
            assert world.server is not None
            await world.server.close()
            await world.serve(opener())
            reading = asyncio.ensure_future(disk.read(0, 4096))
            done, _ = await asyncio.wait([reading], timeout=0.1)
            assert not done
            await device(world).life.resume()
            assert await reading == b"a" * 4096

    run(work())


def test_other_storage_is_there_from_one_request_to_the_next(tmp_path: Path) -> None:
    async def work() -> None:
        one, other = image(tmp_path / "a", b"a"), image(tmp_path / "b", b"b")
        async with disk_world() as world, await world.disk(str(one), front=FOUR_QUEUES) as disk:
            assert await disk.read(0, 4096) == b"a" * 4096
            await device(world).life.swap(str(other), 10)
            assert await disk.read(0, 4096) == b"b" * 4096
            await disk.write(4096, b"c" * 512)
            await disk.flush()
        assert one.read_bytes() == b"a" * (8 << 20)
        assert other.read_bytes()[4096:4609] == b"c" * 512 + b"b"

    run(work())


def test_the_next_backend_has_the_storage_that_the_last_one_had(tmp_path: Path) -> None:
    async def work() -> None:
        one, other = image(tmp_path / "a", b"a"), image(tmp_path / "b", b"b")
        async with disk_world() as world, await world.disk(str(one)) as disk:
            await device(world).life.swap(str(other), 10)
            assert world.server is not None
            await world.server.close()
            await world.serve(opener())
            assert await disk.read(0, 4096) == b"b" * 4096
            assignment = device(world).assignment
            assert assignment is not None
            assert assignment.image == str(other)

    run(work())


def test_a_predecessors_guest_has_what_it_is_exchanged_for_before_it_is_back(
    tmp_path: Path,
) -> None:
    """The guest is not connected to this backend yet, and to the one after it."""
    one, other = image(tmp_path / "a", b"a"), image(tmp_path / "b", b"b")

    async def work() -> None:
        async with disk_world() as world:
            await world.attach(str(one))
            assert device(world).disk.engine is not None
            kept = DiskState(Path(world.journals.name), "backend/vbd/1/51712")
            kept.remember(device(world).disk.storage.engine.identity)
            await device(world).life.swap(str(other), 10)
            kept.check_identity(device(world).disk.storage.engine.identity)

    run(work())


def test_a_disk_of_the_same_name_that_is_attached_later_has_its_own_storage(tmp_path: Path) -> None:
    async def work() -> None:
        one, other = image(tmp_path / "a", b"a"), image(tmp_path / "b", b"b")
        async with disk_world() as world:
            vbd = await world.attach(str(one))
            async with await world.open(vbd):
                await device(world).life.swap(str(other), 10)
            await detach(world.store, vbd)
            async with await world.disk(str(one)) as disk:
                assert await disk.read(0, 4096) == b"a" * 4096

    run(work())


def test_nothing_is_lost_while_storage_is_exchanged_under_load() -> None:
    content = bytearray(8 << 20)

    async def open_storage(_: BackendAssignment) -> Engine:
        engine = PythonEngine(8 << 20)
        engine.data = content  # the same, whichever of them has it
        return engine

    async def work() -> None:
        async def use(slot: int) -> None:
            for turn in range(100):
                data = f"{slot} {turn} ".encode().ljust(4096, b".")
                await disk.write(slot * 4096, data)
                assert await disk.read(slot * 4096, 4096) == data

        async with (
            disk_world(open_storage=open_storage) as world,
            await world.disk(front=FOUR_QUEUES) as disk,
        ):
            users = asyncio.gather(*(use(slot) for slot in range(16)))
            for turn in range(20):
                await device(world).life.swap(f"other {turn}", 10)
            await users

    run(work())


PROMISED = BackendFeatures(sectors=2048, flush=True, discard=True)


@pytest.mark.parametrize(
    ("has", "words"),
    [
        (BackendFeatures(sectors=2048, discard=True), []),
        (BackendFeatures(sectors=4096, discard=True), []),
        (
            BackendFeatures(sectors=2047, discard=True),
            ["it has 1048064 bytes and the disk 1048576"],
        ),
        (
            BackendFeatures(sectors=2048, sector_size=4096, discard=True),
            ["its blocks are of 4096 bytes and the disk's of 512"],
        ),
        (
            BackendFeatures(sectors=2048, info=InfoFlag.READONLY, flush=False),
            [
                "it is read-only and the disk is not",
                "it cannot do what the guest was told of: flush, discard",
            ],
        ),
    ],
)
def test_what_a_guest_was_promised(has: BackendFeatures, words: Sequence[str]) -> None:
    assert unmet(PROMISED, has) == words


class Stuck(PythonEngine):
    """Storage that answers when it is let."""

    def __init__(self) -> None:
        super().__init__(8 << 20)
        self.let = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def read(self, buffer: memoryview, offset: int) -> None:
        asyncio.run_coroutine_threadsafe(self.let.wait(), self._loop).result()
        super().read(buffer, offset)


def test_storage_that_does_not_come_to_rest_is_not_paused_for_ever() -> None:
    async def work() -> None:
        engine = Stuck()

        async def open_storage(_: BackendAssignment) -> Engine:
            return engine

        async with disk_world(open_storage=open_storage) as world, await world.disk() as disk:
            reading = asyncio.ensure_future(disk.read(0, 4096))
            await asyncio.sleep(0.05)
            with pytest.raises(ConfigError, match=r"1 requests are still .* the disk goes on"):
                await device(world).life.pause(0.01)
            engine.let.set()
            assert await reading == bytes(4096)
            assert await disk.read(4096, 4096) == bytes(4096)

    run(work())


def test_storage_that_does_not_fit_or_cannot_be_opened_changes_nothing(tmp_path: Path) -> None:
    async def work() -> None:
        one, small = image(tmp_path / "a", b"a"), image(tmp_path / "b", b"b", 4 << 20)
        async with disk_world() as world, await world.disk(str(one)) as disk:
            with pytest.raises(ConfigError, match="does not fit: it has 4194304 bytes"):
                await device(world).life.swap(str(small), 10)
            with pytest.raises(OSError, match="no-such") as raised:
                await device(world).life.swap(str(tmp_path / "no-such"), 10)
            assert raised.value.errno == errno.ENOENT
            assert await disk.read(0, 4096) == b"a" * 4096
            small.rename(tmp_path / "c")  # it is not open any more, and nobody has it locked

    run(work())


class NoChannel(PythonEngine):
    @property
    def info(self) -> EngineInfo:
        return EngineInfo(size=8 << 20, can_discard=True)

    def open_channel(self):  # type: ignore[no-untyped-def]
        raise EngineError(errno.EMFILE, "no more channels")


def test_storage_without_a_channel_changes_nothing() -> None:
    async def work() -> None:
        no_channel = NoChannel(8 << 20)

        async def open_storage(assignment: BackendAssignment) -> Engine:
            return no_channel if assignment.image == "none" else PythonEngine(8 << 20)

        async with disk_world(open_storage=open_storage) as world, await world.disk() as disk:
            await disk.write(0, b"x" * 512)
            with pytest.raises(EngineError, match="no more channels"):
                await device(world).life.swap("none", 10)
            assert (await disk.read(0, 512), no_channel.closed) == (b"x" * 512, 1)

    run(work())


def test_a_guest_that_leaves_a_paused_disk_is_let_go() -> None:
    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach()
            disk = await world.open(vbd)
            await device(world).life.pause(10)
            await disk.close()
            await detach(world.store, vbd)

    run(work())


class NotClosed(PythonEngine):
    def close(self) -> None:
        super().close()
        raise OSError(errno.EIO, "it does not close")


def test_old_storage_that_does_not_close_does_not_cost_the_new(expect_log) -> None:
    expect_log("its storage could not be closed: .*it does not close")

    async def work() -> None:
        engines = [NotClosed(8 << 20), PythonEngine(8 << 20)]

        async def open_storage(assignment: BackendAssignment) -> Engine:
            return engines[assignment.image == "other"]

        async with disk_world(open_storage=open_storage) as world, await world.disk() as disk:
            await device(world).life.swap("other", 10)
            await disk.write(0, b"x" * 512)
            assert (engines[1].data[:1], engines[1].closed) == (b"x", 0)

    run(work())


def test_a_pause_that_cannot_be_noted_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise BudgetError("no room", "state")

    async def work() -> None:
        async with disk_world() as world, await world.disk() as disk:
            with monkeypatch.context() as patch:
                patch.setattr(DiskState, "decide", no_room)
                with pytest.raises(BudgetError):
                    await device(world).life.pause(10)
            assert await disk.read(0, 512) == bytes(512)

    run(work())
