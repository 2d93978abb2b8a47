# SPDX-License-Identifier: Apache-2.0
"""Disks that are mirrored and backed up while their guests use them."""

import asyncio
import errno
import random
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from rig_disk import World, disk_world, opener, run, until
from rig_engines import PythonEngine

from xvd.backend import copies, tracking
from xvd.backend.copies import Phase
from xvd.backend.device import Device
from xvd.blkif.assignment import BackendAssignment
from xvd.engines.interface import Channel, Engine
from xvd.engines.memory import MemoryEngine
from xvd.engines.uri import storage_uri
from xvd.errors import ConfigError, EngineError
from xvd.frontend.disk import Disk
from xvd.frontend.settings import Settings as FrontSettings

SIZE, BLOCK, USERS = 8 << 20, 4096, 4
BLOCKS = SIZE // BLOCK
TWO_QUEUES = FrontSettings(max_queues=2)


def device(world: World) -> Device:
    assert world.server is not None
    return world.server.device("1/51712")


def image(path: Path, seed: int = 1) -> Path:
    path.write_bytes(random.Random(seed).randbytes(SIZE // 2) + bytes(SIZE // 2))
    return path


async def phase(world: World, wanted: Phase) -> None:
    """Wait until the copy is so far."""
    job = device(world).copies.job
    assert job is not None
    await until(lambda: job.phase in (wanted, Phase.FAILED))
    assert job.phase is wanted, job.why


async def use(disk: Disk, user: int, stop: asyncio.Event) -> None:
    """Write blocks that nobody else writes, at random, and discard some."""
    draw = random.Random(user)
    while not stop.is_set():
        block = draw.randrange(BLOCKS // USERS) * USERS + user
        if draw.random() < 0.05:
            await disk.discard(block * BLOCK, BLOCK)
        else:
            await disk.write(block * BLOCK, draw.randbytes(16) * (BLOCK // 16))


def content(target: str, path: Path) -> bytes:
    """What a guest would read of an image."""
    if not target.startswith("qcow2:"):
        return path.read_bytes()
    raw = path.with_suffix(".converted")
    words = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(raw)]
    subprocess.run(words, check=True)
    return raw.read_bytes()


def test_a_mirror_is_the_same_when_the_disk_moves_to_it(tmp_path: Path) -> None:
    one, other = image(tmp_path / "a"), tmp_path / "b"

    async def work() -> None:
        async with disk_world() as world, await world.disk(str(one), front=TWO_QUEUES) as disk:
            stop = asyncio.Event()
            users = [asyncio.ensure_future(use(disk, n, stop)) for n in range(USERS)]
            await device(world).copies.mirror(str(other))
            await phase(world, Phase.READY)
            stop.set()
            await asyncio.gather(*users)
            await device(world).copies.pivot()
            assert one.read_bytes() == other.read_bytes()
            await disk.write(0, b"n" * 512)
            await disk.flush()
            assert device(world).disk.counters().errors == 0

    run(work())

    assert other.read_bytes()[:512] == b"n" * 512
    assert one.read_bytes()[:512] != b"n" * 512


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("raw", "qcow2"), ("qcow2", "qcow2"), ("qcow2", "raw")])
def test_storage_of_every_kind_is_mirrored_under_load(
    tmp_path: Path, requires_tool: Callable[[str], str], kinds: tuple[str, str]
) -> None:
    requires_tool("qemu-storage-daemon")
    qemu_img = requires_tool("qemu-img")
    paths = [image(tmp_path / "a.raw"), tmp_path / "b"]
    if kinds[0] == "qcow2":
        raw, paths[0] = paths[0], tmp_path / "a"
        words = ["convert", "-f", "raw", "-O", "qcow2", str(raw), str(paths[0])]
        subprocess.run([qemu_img, *words], check=True)
    one, other = (f"{kind}:{path}" for kind, path in zip(kinds, paths, strict=True))
    states: list[bytes] = []

    async def work() -> None:
        async with disk_world() as world, await world.disk(one, front=TWO_QUEUES) as disk:
            stop = asyncio.Event()
            users = [asyncio.ensure_future(use(disk, n, stop)) for n in range(USERS)]
            await device(world).copies.mirror(other)
            await phase(world, Phase.READY)
            stop.set()
            await asyncio.gather(*users)
            states.append(bytes(await disk.read(0, SIZE)))
            await device(world).copies.pivot()
            states.append(bytes(await disk.read(0, SIZE)))
            assert device(world).disk.counters().errors == 0

    run(work())

    assert states[0] == states[1]
    assert content(other, paths[1]) == states[1] == content(one, paths[0])


def test_a_mirror_is_given_up_and_the_disk_keeps_its_storage(tmp_path: Path) -> None:
    one, other = image(tmp_path / "a"), image(tmp_path / "b", 2)

    async def work() -> None:
        async with disk_world() as world, await world.disk(str(one)) as disk:
            its = device(world).copies
            await its.mirror(str(other))
            with pytest.raises(ConfigError, match="is being copied to"):
                await device(world).life.swap(str(other), 10)
            with pytest.raises(ConfigError, match="is being copied to"):
                await its.backup(str(tmp_path / "c"))
            await its.cancel()
            assert its.job is not None
            assert its.job.phase is Phase.CANCELLED
            await disk.write(0, b"n" * 512)
            await disk.flush()
            with pytest.raises(ConfigError, match="no copy of it is being made"):
                await its.cancel()
            with pytest.raises(ConfigError, match="it has no mirror"):
                await its.pivot()

    run(work())

    assert one.read_bytes()[:512] == b"n" * 512
    assert other.read_bytes()[:512] != b"n" * 512


def test_storage_that_does_not_fit_is_not_mirrored_to_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    one, small = image(tmp_path / "a"), tmp_path / "small"
    small.write_bytes(bytes(4096))

    async def work() -> None:
        async with disk_world() as world, await world.disk(str(one)) as disk:
            await device(world).copies.mirror(str(tmp_path / "new"))
            await device(world).copies.cancel()
            assert not (tmp_path / "new").exists()
            for copy in (device(world).copies.mirror, device(world).copies.backup):
                with pytest.raises(ConfigError, match="4096 bytes and the disk 8388608"):
                    await copy(str(small))
            await disk.read(0, 512)

    run(work())


class Failing(MemoryEngine):
    """Fails every write from now on, or not."""

    fails = False

    def write(self, buffer: memoryview, offset: int) -> None:
        if self.fails:
            raise EngineError(errno.ENOSPC, "there is no room")
        super().write(buffer, offset)

    def open_channel(self) -> Channel:
        return Engine.open_channel(self)


@pytest.mark.parametrize("fails_at_once", [True, False])
def test_a_target_that_fails_is_nothing_to_the_guest(
    tmp_path: Path, fails_at_once: bool, expect_log
) -> None:
    expect_log("the copy to memory:8M has failed: ")
    one = image(tmp_path / "a")
    target = Failing(SIZE)
    target.fails = fails_at_once

    async def work() -> None:
        async with disk_world() as world, await world.disk(str(one)) as disk:

            async def open_target(_: str) -> Engine:
                return target

            device(world).life.open = open_target
            its = device(world).copies
            await its.mirror("memory:8M")
            if not fails_at_once:
                await phase(world, Phase.READY)
                target.fails = True
            await disk.write(0, b"n" * 512)
            await phase(world, Phase.FAILED)
            await disk.write(512, b"m" * 512)
            await disk.flush()
            assert device(world).disk.counters().errors == 0
            assert device(world).life.held_by == ""

    run(work())

    assert one.read_bytes()[:1024] == b"n" * 512 + b"m" * 512


class Waits(MemoryEngine):
    """Storage that goes on when it is told to."""

    def __init__(self) -> None:
        super().__init__(SIZE)
        self.waiting, self.go = threading.Event(), threading.Event()

    def wait(self) -> None:
        self.waiting.set()
        self.go.wait(20)


class FlushWaits(Waits):
    def flush(self) -> None:
        self.wait()


class WritesWait(Waits):
    def write(self, buffer: memoryview, offset: int) -> None:
        self.wait()
        super().write(buffer, offset)

    def open_channel(self) -> Channel:
        return Engine.open_channel(self)


def test_a_copy_that_cannot_be_given_up_now_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "PATIENCE_S", 0.05)
    storage = WritesWait()

    async def open_storage(assignment: BackendAssignment) -> Engine:
        return storage if storage_uri(assignment) == "memory:8M" else await opener()(assignment)

    async def work() -> None:
        async with disk_world(open_storage=open_storage) as world, await world.disk() as disk:
            await device(world).copies.mirror("memory:8192K")
            await phase(world, Phase.READY)
            writing = asyncio.ensure_future(disk.write(0, b"n" * 512))
            await until(storage.waiting.is_set)
            with pytest.raises(ConfigError, match="1 requests are still with the storage"):
                await device(world).copies.cancel()
            job = device(world).copies.job
            assert job is not None
            assert job.task is not None
            assert not job.task.done()
            storage.go.set()
            await writing
            await device(world).copies.cancel()
            assert job.phase is Phase.CANCELLED

    run(work())


def test_a_disk_that_goes_while_it_is_copied_leaves_nothing(tmp_path: Path) -> None:
    one = image(tmp_path / "a")

    async def work() -> None:
        async with disk_world() as world, await world.disk(str(one)) as disk:
            await device(world).copies.mirror("memory:8M")
            await disk.write(0, b"n" * 512)

    run(work())  # the machine's accounting is the assertion

    assert one.read_bytes()[:512] == b"n" * 512


# ---- Backups -----------------------------------------------------------------------------------


async def write_in_order(disk: Disk, stop: asyncio.Event, first: int) -> int:
    """Number one block after the other, each when the one before is there; the next number."""
    number = first
    while not stop.is_set():
        await disk.write(number % BLOCKS * BLOCK, struct.pack("<Q", number) * (BLOCK // 8))
        number += 1
    return number


def is_one_moment(data: bytes) -> bool:
    """Whether the numbers on a disk are those that it has had at one time."""
    numbers = [struct.unpack_from("<Q", data, block * BLOCK)[0] for block in range(BLOCKS)]
    last = max(numbers)
    written = sum(number > last - BLOCKS for number in numbers if number)
    return written == min(last, BLOCKS) and all(
        number in (0, last - (last - block) % BLOCKS) for block, number in enumerate(numbers)
    )


@pytest.mark.tools
@pytest.mark.slow
def test_backups_under_load_have_the_state_of_one_moment_each(
    tmp_path: Path, requires_tool: Callable[[str], str]
) -> None:
    requires_tool("qemu-storage-daemon")
    requires_tool("qemu-img")
    one = tmp_path / "a"
    one.write_bytes(bytes(SIZE))
    days = [f"qcow2:{tmp_path}/day{n}.qcow2" for n in range(4)]
    sizes = []

    async def work() -> None:
        async with disk_world() as world, await world.disk(str(one)) as disk:
            number = 1
            for day in days:
                stop = asyncio.Event()
                writing = asyncio.ensure_future(write_in_order(disk, stop, number))
                await device(world).copies.backup(day, "nightly")
                await phase(world, Phase.DONE)
                job = device(world).copies.job
                assert job is not None
                sizes.append((job.incremental, job.copied))
                stop.set()
                number = await writing
            await device(world).copies.backup(f"raw:{tmp_path}/last")
            await phase(world, Phase.DONE)

    run(work())

    for day in days:
        assert is_one_moment(content(day, Path(day.removeprefix("qcow2:"))))
    assert (tmp_path / "last").read_bytes() == one.read_bytes()
    assert [incremental for incremental, _ in sizes] == [False, True, True, True]


def test_a_guest_that_connects_while_a_backup_ends_has_its_changes_noted(tmp_path: Path) -> None:
    one, target = image(tmp_path / "a"), FlushWaits()

    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach(str(one))

            async def open_target(_: str) -> Engine:
                return target

            device(world).life.open = open_target
            await device(world).copies.backup("memory:8M", "nightly")
            await until(target.waiting.is_set)
            disk = await world.open(vbd)
            target.go.set()
            await phase(world, Phase.DONE)
            await disk.write(0, b"n" * 512)
            assert changed_since(world) == 1 << 16
            await disk.close()

    run(work())


def changed_since(world: World) -> object:
    return device(world).tracking.names["nightly"]["changed"]


def test_what_is_written_just_before_a_backup_begins_is_in_it(tmp_path: Path) -> None:
    one, copy = image(tmp_path / "a"), tmp_path / "copy"

    async def work() -> None:
        async with disk_world() as world, await world.disk(str(one)) as disk:
            its = device(world).copies
            await its.backup(str(copy), "nightly")
            await phase(world, Phase.DONE)
            async with device(world).life.turn:
                beginning = asyncio.ensure_future(its.backup(str(copy), "nightly"))
                await until(lambda: bool(device(world).life.turn._waiters))
                await disk.write(0, b"n" * 512)
            await beginning
            await phase(world, Phase.DONE)

    run(work())

    assert copy.read_bytes() == one.read_bytes()
    assert copy.read_bytes()[:512] == b"n" * 512


def test_what_has_changed_is_known_to_the_next_backend(tmp_path: Path) -> None:
    one, copy = image(tmp_path / "a"), tmp_path / "copy"

    async def work() -> None:
        async with disk_world() as world, await world.disk(str(one)) as disk:
            await device(world).copies.backup(str(copy), "nightly")
            await phase(world, Phase.DONE)
            assert copy.read_bytes() == one.read_bytes()
            assert copy.stat().st_mode & 0o777 == 0o600
            await disk.write(1 << 20, b"n" * 512)
            assert world.server is not None
            await world.server.close()
            await world.serve(opener())
            await disk.write(2 << 20, b"m" * 512)
            assert changed_since(world) == 2 << 16
            await device(world).copies.backup(str(copy), "nightly")
            await phase(world, Phase.DONE)
            job = device(world).copies.job
            assert job is not None
            assert (job.incremental, job.copied) == (True, 2 << 16)
            assert changed_since(world) == 0

    run(work())

    assert copy.read_bytes() == one.read_bytes()


def test_everything_counts_as_changed_when_the_host_was_started_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect_log
) -> None:
    one, copy = image(tmp_path / "a"), tmp_path / "copy"
    expect_log("backup nightly are not known: this host was started anew")

    async def work() -> None:
        async with disk_world() as world, await world.disk(str(one)) as disk:
            await device(world).copies.backup(str(copy), "nightly")
            await phase(world, Phase.DONE)
            assert world.server is not None
            await world.server.close()
            monkeypatch.setattr(tracking, "boot_id", lambda: "another")
            await world.serve(opener())
            await disk.read(0, 512)
            assert device(world).tracking.names == {}

    run(work())


def test_everything_counts_as_changed_on_other_storage_and_when_it_grows(tmp_path: Path) -> None:
    one, other = image(tmp_path / "a"), image(tmp_path / "b", 2)

    async def work() -> None:
        async with disk_world() as world, await world.disk(str(one)):
            await device(world).copies.backup(str(tmp_path / "c"), "nightly")
            await phase(world, Phase.DONE)
            await device(world).life.swap(str(other), 10)
            assert device(world).tracking.names == {}
            await device(world).copies.backup(str(tmp_path / "d"), "nightly")
            await phase(world, Phase.DONE)
            assert (tmp_path / "d").read_bytes() == other.read_bytes()
            await device(world).disk.resize(2 * SIZE)
            await device(world).copies.backup(str(tmp_path / "e"), "nightly")
            await phase(world, Phase.DONE)
            assert (tmp_path / "e").read_bytes() == other.read_bytes()

    run(work())


def test_the_map_goes_with_the_disk_to_its_mirror(tmp_path: Path) -> None:
    one, other, copy = image(tmp_path / "a"), tmp_path / "b", tmp_path / "copy"

    async def work() -> None:
        async with disk_world() as world, await world.disk(str(one)) as disk:
            await device(world).copies.backup(str(copy), "nightly")
            await phase(world, Phase.DONE)
            await disk.write(0, b"n" * 512)
            await device(world).copies.mirror(str(other))
            await phase(world, Phase.READY)
            await disk.write(3 << 20, b"m" * 512)
            await device(world).copies.pivot()
            await disk.write(5 << 20, b"l" * 512)
            assert changed_since(world) == 3 << 16
            await device(world).copies.backup(str(copy), "nightly")
            await phase(world, Phase.DONE)

    run(work())

    assert copy.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("name", ["", "a/b", "..x/", "n" * 65])
def test_what_is_no_name_is_refused(tmp_path: Path, name: str) -> None:
    async def work() -> None:
        async with disk_world() as world, await world.disk(str(image(tmp_path / "a"))):
            with pytest.raises(ConfigError, match="is no name of a backup"):
                device(world).tracking.last(name, SIZE)

    run(work())


def test_an_engine_in_python_is_mirrored_too(tmp_path: Path) -> None:
    one = image(tmp_path / "a")
    target = PythonEngine(SIZE)

    async def work() -> None:
        async with disk_world() as world, await world.disk(str(one)) as disk:

            async def open_target(_: str) -> Engine:
                return target

            device(world).life.open = open_target
            await device(world).copies.backup("memory:8M")
            await disk.write(0, b"n" * 512)
            await phase(world, Phase.DONE)

    run(work())

    assert bytes(target.data[512:]) == one.read_bytes()[512:]
