# SPDX-License-Identifier: Apache-2.0
"""A write of zeros as data, as zeros that keep their space, or as a hole."""

import errno
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from qemu_img import run_qemu_img
from rig_disk import disk_world, run
from rig_engines import ByHand, PythonEngine, image
from rig_queue import ALL, QueueWorld, rq

from xvd.blkif.abi import Op, Status
from xvd.engines.image import FileEngine
from xvd.engines.interface import Engine
from xvd.engines.layers.zeroes import DetectZeroes
from xvd.engines.live.mirror import Mirror
from xvd.engines.live.tracked import ChangeMap, Tracked, map_size
from xvd.engines.memory import MemoryEngine
from xvd.engines.uri import open_engine
from xvd.engines.zeroes import all_zero
from xvd.errors import ConfigError

ZEROES = ("off", "on", "unmap")
LAYERS = {"off": "", "on": "detect-zeroes:unmap=off|", "unmap": "detect-zeroes|"}
MIB = 1 << 20
FULL = MIB // 512
"""Blocks of an image that is full of data, as stat counts."""


@pytest.fixture
def full(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"d" * MIB)
    os.sync()
    return path


@pytest.fixture
def in_memory() -> Iterator[Path]:
    if not Path("/dev/shm").is_dir():
        pytest.skip("there is no tmpfs in /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as where:
        path = Path(where) / "disk.img"
        path.write_bytes(b"d" * MIB)
        yield path


def write_by_queue(uri: str | Engine, *pages: bytes) -> None:
    """Write 32 pages at most from the beginning of a disk on, in one request."""
    with QueueWorld(uri, indirect_max=32) as world, world.running():
        for number, page in enumerate(pages):
            world.data(number)[:] = page
        world.send(world.indirect(Op.WRITE, 0, [world.segment(n) for n in range(len(pages))]))
        world.port.notify()
        [answer] = world.collect(1)
        world.send(rq(Op.FLUSH_DISKCACHE))
        world.port.notify()
        world.collect(1)
    assert answer.status == Status.OKAY


def write_by_engine(uri: str, *pages: bytes) -> None:
    engine = open_engine(uri)
    engine.write(memoryview(b"".join(pages)), 0)
    engine.flush()
    engine.close()


def by_option(path: Path, zeroes: str) -> str:
    return f"file:{path},detect-zeroes={zeroes}"


def by_layer(path: Path, zeroes: str) -> str:
    return f"{LAYERS[zeroes]}{path}"


def both(case: Callable[..., None]) -> Callable[..., None]:
    """By a queue and by calls from Python, as an option of a file and as a layer."""
    ways = pytest.mark.parametrize("write", [write_by_queue, write_by_engine])
    return ways(pytest.mark.parametrize("uri", [by_option, by_layer])(case))


@both
@pytest.mark.parametrize(("zeroes", "freed"), [("off", 0), ("on", 0), ("unmap", 64)])
def test_zeros_are_read_and_take_the_space_that_was_asked_for(
    full: Path, write, uri, zeroes: str, freed: int
) -> None:
    write(uri(full, zeroes), *[bytes(4096)] * 8)

    assert full.read_bytes() == bytes(32768) + b"d" * (MIB - 32768)
    assert full.stat().st_blocks == FULL - freed


@both
@pytest.mark.parametrize("at", [0, 15, 16, 17, 4095, 4096, 8191])
def test_what_is_not_all_zeros_is_data(full: Path, write, uri, at: int) -> None:
    data = bytearray(8192)
    data[at] = 1

    write(uri(full, "unmap"), bytes(data[:4096]), bytes(data[4096:]))

    assert full.read_bytes()[:8192] == data
    assert full.stat().st_blocks == FULL


@both
@pytest.mark.parametrize("zeroes", ZEROES)
def test_where_the_file_system_cannot_they_are_data(
    in_memory: Path, write, uri, zeroes: str
) -> None:
    """tmpfs punches holes and has no other way to zero a range."""
    write(uri(in_memory, zeroes), *[bytes(4096)] * 4)

    assert in_memory.read_bytes() == bytes(16384) + b"d" * (MIB - 16384)
    assert in_memory.stat().st_blocks == FULL - (32 if zeroes == "unmap" else 0)


def test_a_sparse_image_stays_sparse(tmp_path: Path) -> None:
    path = image(tmp_path)
    write_by_queue(f"detect-zeroes|{path}", *[bytes(4096)] * 11)
    with path.open("rb") as file:
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 0
    assert path.stat().st_blocks == 0


@pytest.mark.parametrize("scheme", ["", "file:", "raw:"])
def test_the_option_stands_behind_the_path(full: Path, scheme: str) -> None:
    engine = open_engine(f"{scheme}{full},detect-zeroes=unmap")
    engine.write(memoryview(bytes(4096)), 0)
    engine.flush()
    engine.close()
    assert full.stat().st_blocks == FULL - 8


@pytest.mark.parametrize("name", ["a,b.img", "x,detect-zeroes=unmap", "y,detect-zeroes=maybe"])
def test_a_file_of_that_name_is_that_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"d" * 4096)
    engine = open_engine(str(path))
    assert engine.info.size == 4096
    engine.close()


def test_a_word_that_it_does_not_know_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="detect-zeroes takes off, on, unmap, not 'yes'"):
        open_engine(f"{image(tmp_path)},detect-zeroes=yes")


@pytest.mark.parametrize("size", [1, 15, 16, 17, 512])
def test_all_zero(size: int) -> None:
    assert all_zero(bytes(size))
    for at in range(size):
        assert not all_zero(bytes(at) + b"\x80" + bytes(size - at - 1))
    assert not all_zero(b"")


# ---- The layer, in front of anything ----


def test_an_option_that_it_does_not_know_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="unmap= takes on or off, not 'yes'"):
        open_engine("detect-zeroes:unmap=yes|memory:1M")


@pytest.mark.parametrize("unmap", [True, False])
def test_memory_is_zeros(unmap: bool) -> None:
    memory = MemoryEngine(MIB)
    memory.view[:] = b"d" * MIB

    write_by_queue(DetectZeroes(memory, unmap=unmap), *[bytes(4096)] * 8)

    assert memory.view == bytes(32768) + b"d" * (MIB - 32768)


def test_it_tells_where_the_storage_has_holes(full: Path) -> None:
    engine = open_engine(f"detect-zeroes|{full}")
    engine.write(memoryview(bytes(8192)), 0)

    first, *_ = engine.extents(0, MIB, 2)

    engine.close()
    assert engine.info.tells_holes
    assert (first.length, first.hole) == (8192, True)


def test_an_engine_in_python_is_asked_for_zeros_and_then_given_them() -> None:
    class Asked(PythonEngine):
        asked = ()

        def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
            self.asked = (offset, length, unmap)
            super().write_zeroes(offset, length, unmap=unmap)

    engine = Asked(MIB)
    engine.data[:] = b"d" * MIB

    write_by_queue(DetectZeroes(engine), *[bytes(4096)] * 2)

    assert engine.asked == (0, 8192, True)
    assert engine.data == bytes(8192) + b"d" * (MIB - 8192)


@contextmanager
def held(op: Op = Op.WRITE) -> Iterator[tuple[QueueWorld, ByHand]]:
    """Two pages of zeros on their way to storage whose operations the test completes."""
    engine = ByHand(MIB)
    with QueueWorld(DetectZeroes(engine), offered=ALL | 1 << Op.WRITE_BARRIER) as world:
        for number in range(2):
            world.data(number)[:] = bytes(4096)
        world.send(rq(op, 0, world.segment(0), world.segment(1)))
        world.settle()
        yield world, engine


def test_pages_that_change_after_the_look_are_not_looked_at_again() -> None:
    with held() as (world, engine):
        [operation] = engine.channel.take()
        world.data(0)[:] = world.data(1)[:] = b"x" * 4096

        data = b"".join(operation.buffers())

        assert (operation.kind, operation.zeroes, operation.unmap) == ("write", True, True)
        assert data == bytes(8192)
        operation.complete()
        world.settle()


def test_what_was_never_all_zeros_is_never_stored_as_zeros() -> None:
    """A guest that puts its first bytes to zero and back all the time, while the rest is data."""
    memory = MemoryEngine(MIB)
    done = threading.Event()
    with QueueWorld(DetectZeroes(memory)) as world, world.running():
        page = world.data(0)
        page[:] = b"x" * 4096

        def flip() -> None:
            while not done.is_set():
                page[:16] = bytes(16)
                page[:16] = b"x" * 16

        thread = threading.Thread(target=flip)
        thread.start()
        lost = 0
        for number in range(500):
            world.send(rq(Op.WRITE, 0, world.segment(0), id=number))
            world.port.notify()
            world.collect(1)
            lost += memory.view[16:4096] != b"x" * 4080
        done.set()
        thread.join()

    assert lost == 0


def test_zeros_keep_their_place_between_flushes() -> None:
    with held(Op.WRITE_BARRIER) as (world, engine):
        kinds = []
        while taken := engine.channel.take():
            [operation] = taken
            kinds.append((operation.kind, operation.zeroes))
            operation.complete()
            world.settle()

        assert kinds == [("flush", False), ("write", True), ("flush", False)]


@pytest.mark.parametrize(
    ("error", "status"), [(errno.EIO, Status.ERROR), (errno.ENOSPC, Status.ERROR), (0, Status.OKAY)]
)
def test_its_guest_hears_what_the_storage_says(error: int, status: Status) -> None:
    with held() as (world, engine):
        [operation] = engine.channel.take()

        operation.complete(error)

        world.settle()
        assert [answer.status for answer in world.responses()] == [status]


def test_zeros_are_a_change() -> None:
    changed = ChangeMap(bytearray(map_size(MIB)), MIB)

    write_by_queue(DetectZeroes(Tracked(MemoryEngine(MIB), [changed])), bytes(4096))

    assert changed.is_marked(0)
    assert changed.marked == 1


def test_both_sides_of_a_mirror_have_holes(full: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    mirror = Mirror(FileEngine(str(full)), FileEngine(str(_copy(full, other))), _nothing_differs())

    write_by_queue(DetectZeroes(mirror), *[bytes(4096)] * 8)

    assert full.read_bytes() == other.read_bytes() == bytes(32768) + b"d" * (MIB - 32768)
    assert full.stat().st_blocks == other.stat().st_blocks == FULL - 64


def _copy(path: Path, to: Path) -> Path:
    to.write_bytes(path.read_bytes())
    os.sync()
    return to


def _nothing_differs() -> ChangeMap:
    return ChangeMap(bytearray(map_size(MIB)), MIB)


def test_zeros_over_an_image_that_stays_are_holes_in_what_is_over_it(
    full: Path, tmp_path: Path
) -> None:
    over = tmp_path / "over"

    write_by_queue(f"detect-zeroes|cow:file={over}|{full}", *[bytes(4096)] * 8)

    engine = open_engine(f"cow:file={over}|{full}")
    found = bytearray(65536)
    engine.read(memoryview(found), 0)
    engine.close()
    assert found == bytes(32768) + b"d" * 32768
    assert over.stat().st_blocks == 0
    assert full.read_bytes() == b"d" * MIB


def test_a_disk_is_attached_and_swapped_with_it(full: Path, tmp_path: Path) -> None:
    other = _copy(full, tmp_path / "other.img")

    async def work() -> None:
        async with disk_world() as world, await world.disk(f"detect-zeroes|{full}") as disk:
            await disk.write(0, bytes(32768))
            assert world.server is not None
            life = world.server.device("1/51712").life
            await life.swap(f"detect-zeroes:unmap=off|{other}", 10)
            await disk.write(0, bytes(32768))
            await disk.flush()

    run(work())

    assert full.read_bytes() == other.read_bytes() == bytes(32768) + b"d" * (MIB - 32768)
    assert (full.stat().st_blocks, other.stat().st_blocks) == (FULL - 64, FULL)


# ---- By a storage daemon ----


@pytest.fixture
def full_qcow2(
    full: Path, tmp_path: Path, requires_tool: Callable[[str], str]
) -> tuple[Path, Callable[..., str]]:
    """An image that is full of data, and what runs qemu-img."""
    requires_tool("qemu-storage-daemon")
    tool = requires_tool("qemu-img")
    path = tmp_path / "disk.qcow2"
    run_qemu_img(tool, "convert", "-O", "qcow2", full, path)
    return path, lambda *words: run_qemu_img(tool, *words)


def has_data(path: Path, img: Callable[..., str]) -> bool:
    """Whether the beginning of an image takes space."""
    first = json.loads(img("map", "--output=json", "-f", "qcow2", path))[0]
    return bool(first["data"]) or "offset" in first


@pytest.mark.parametrize("write", [write_by_queue, write_by_engine])
@pytest.mark.parametrize(("zeroes", "data"), [("off", True), ("on", True), ("unmap", False)])
def test_an_image_of_a_format_lets_go_of_zeros(
    full_qcow2: tuple[Path, Callable[..., str]], write, zeroes: str, data: bool
) -> None:
    path, img = full_qcow2
    before = path.stat().st_blocks

    write(f"{LAYERS[zeroes]}qcow2:{path}", *[bytes(4096)] * 16)

    assert has_data(path, img) == data
    assert path.stat().st_blocks == before - (0 if data else 128)
    engine = open_engine(f"qcow2:{path}")
    found = bytearray(131072)
    engine.read(memoryview(found), 0)
    engine.close()
    assert found == bytes(65536) + b"d" * 65536


def test_zeros_that_a_storage_daemon_fails_at_are_data(
    full: Path, requires_tool: Callable[[str], str]
) -> None:
    requires_tool("qemu-storage-daemon")
    fails = {"event": "none", "iotype": "write-zeroes", "errno": errno.EIO}
    file = {"driver": "file", "filename": str(full)}
    node = {"driver": "blkdebug", "image": file, "inject-error": [fails]}

    write_by_queue(f"detect-zeroes|qemu:{json.dumps(node)}", *[bytes(4096)] * 8)

    assert full.read_bytes() == bytes(32768) + b"d" * (MIB - 32768)
    assert full.stat().st_blocks == FULL
