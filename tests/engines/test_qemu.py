# SPDX-License-Identifier: Apache-2.0
"""Image formats and network storage, by real storage daemons, which are killed too."""

import asyncio
import contextlib
import errno
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from qemu_img import run_qemu_img
from rig_disk import World, disk_world, run, until
from rig_queue import ALL, QueueWorld, rq
from verified_load import Content, contents_of, load

from xvd.blkif.abi import Op, Status
from xvd.engines.checked import Checked
from xvd.engines.qemu import daemon
from xvd.engines.qemu.engine import QemuEngine
from xvd.engines.uri import open_engine
from xvd.errors import ConfigError, EngineError
from xvd.frontend.settings import Settings as FrontSettings

Tool = Callable[[str], str]
SIZE = 32 << 20
BLOCK = 4096
FORMATS = {
    "qcow2": ("-f", "qcow2"),
    "vhdx": ("-f", "vhdx"),
    "vhd": ("-f", "vpc", "-o", "force_size=on"),
    "vmdk": ("-f", "vmdk"),
    "vdi": ("-f", "vdi"),
    "qed": ("-f", "qed"),
    "parallels": ("-f", "parallels"),
}


@pytest.fixture
def img(requires_tool: Tool) -> Callable[..., str]:
    """Runs qemu-img; what it says. A storage daemon has to be here too."""
    requires_tool("qemu-storage-daemon")
    tool = requires_tool("qemu-img")

    def work(*words: object) -> str:
        return run_qemu_img(tool, *words)

    return work


@pytest.fixture
def qcow2(tmp_path: Path, img: Callable[..., str]) -> Path:
    path = tmp_path / "disk.qcow2"
    img("create", "-q", "-f", "qcow2", path, SIZE)
    return path


def qemu_of(world: World) -> QemuEngine:
    assert world.server is not None
    engine = world.server.device("1/51712").disk.engine
    while not isinstance(engine, QemuEngine):
        assert engine is not None
        engine = getattr(engine, "lower", None) or getattr(engine, "_engine", None)
    return engine


def kill(engine: QemuEngine) -> None:
    with contextlib.suppress(OSError):  # it is being started anew
        signal.pidfd_send_signal(engine.keeper.pid_fd, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_what_a_guest_wrote_is_in_the_image(
    tmp_path: Path, img: Callable[..., str], name: str
) -> None:
    path, raw = tmp_path / f"disk.{name}", tmp_path / "disk.raw"
    img("create", "-q", *FORMATS[name], path, SIZE)

    async def work() -> None:
        async with disk_world() as world, await world.disk(f"{name}:{path}") as disk:
            assert disk.size == SIZE
            content = Content(disk, 7, 0, SIZE // BLOCK)
            for _ in range(200):
                await content.step()
            await disk.write(SIZE - BLOCK, b"e" * BLOCK)
            content.blocks[-1] = b"e" * BLOCK
            await content.check()
            raw.write_bytes(b"".join(content.blocks))

    run(work())
    assert img("compare", "-f", FORMATS[name][1], "-F", "raw", path, raw) == (
        "Images are identical.\n"
    )
    if name in ("qcow2", "vhdx", "vdi", "qed", "parallels"):
        assert "No errors were found on the image." in img("check", "-f", FORMATS[name][1], path)


def test_an_overlay_has_what_its_backing_file_has(tmp_path: Path, img: Callable[..., str]) -> None:
    golden, middle, top = (tmp_path / f"{name}.qcow2" for name in ("golden", "middle", "top"))
    raw = tmp_path / "golden.raw"
    raw.write_bytes(b"g" * SIZE)
    img("convert", "-f", "raw", "-O", "qcow2", raw, golden)
    img("create", "-q", "-f", "qcow2", "-b", golden, "-F", "qcow2", middle)
    img("create", "-q", "-f", "qcow2", "-b", middle, "-F", "qcow2", top)

    engine = open_engine(f"qcow2:{top}")
    engine.write(memoryview(b"t" * 512), 512)
    found = bytearray(1536)
    engine.read(memoryview(found), 0)
    engine.close()

    assert found == b"g" * 512 + b"t" * 512 + b"g" * 512
    assert "identical" in img("compare", "-f", "raw", "-F", "qcow2", raw, golden)


@pytest.mark.slow
def test_an_encrypted_image(tmp_path: Path, img: Callable[..., str]) -> None:
    path, key = tmp_path / "disk.luks", tmp_path / "key"
    key.write_text("a passphrase")
    secret = f"secret,id=k,file={key}"
    options = "key-secret=k,iter-time=10"
    img("create", "-q", "--object", secret, "-f", "luks", "-o", options, path, SIZE)

    found = bytearray(512)
    for _ in range(2):
        engine = open_engine(f"luks:{path},key-file={key}")
        engine.read(memoryview(found), 0)
        engine.write(memoryview(b"s" * 512), 0)
        engine.close()

    assert found == b"s" * 512
    assert b"s" * 16 not in path.read_bytes()


@pytest.fixture
def exported(tmp_path: Path, requires_tool: Tool) -> Iterator[tuple[Path, str]]:
    """A raw image, and the socket at which qemu-nbd exports it."""
    raw, socket = tmp_path / "disk.raw", tmp_path / "nbd.sock"
    raw.write_bytes(b"n" * SIZE)
    words = ["-f", "raw", "-k", str(socket), "-x", "disk", "--fork", "--pid-file"]
    pid = tmp_path / "pid"
    subprocess.run([requires_tool("qemu-nbd"), *words, str(pid), "-t", str(raw)], check=True)
    yield raw, str(socket)
    os.kill(int(pid.read_text()), signal.SIGTERM)


def test_an_nbd_export(exported: tuple[Path, str], requires_tool: Tool) -> None:
    requires_tool("qemu-storage-daemon")
    raw, socket = exported
    engine = open_engine(f"nbd+unix:///disk?socket={socket}")
    found = bytearray(512)
    engine.read(memoryview(found), SIZE - 512)
    engine.write(memoryview(b"w" * 512), 0)
    engine.flush()
    engine.close()

    assert (found, raw.read_bytes()[:1024]) == (b"n" * 512, b"w" * 512 + b"n" * 512)


def test_a_block_node_as_qmp_has_it(qcow2: Path) -> None:
    below = {"driver": "file", "filename": str(qcow2)}
    engine = open_engine(f"qemu:{json.dumps({'driver': 'qcow2', 'file': below})}")

    assert engine.info.size == SIZE
    engine.close()


def test_large_and_scattered_requests_and_discards_by_a_queue(qcow2: Path) -> None:
    engine = open_engine(f"qcow2:{qcow2}")
    with (
        QueueWorld(engine, indirect_max=256, data_pages=256, offered=ALL) as world,
        world.running(),
    ):
        segments = [world.segment(page) for page in range(200)]
        for page in range(200):
            world.data(page)[:] = bytes([page]) * BLOCK
        world.send(world.indirect(Op.WRITE, 8, segments, id=1))
        world.port.notify()
        assert [answer.status for answer in world.collect(1)] == [Status.OKAY]
        world.data(0)[:] = bytes(BLOCK)
        world.send(rq(Op.READ, 8 + 8 * 150, world.segment(0), id=2), rq(Op.FLUSH_DISKCACHE, id=3))
        world.port.notify()
        assert [answer.status for answer in world.collect(2)] == [Status.OKAY] * 2
        assert world.data(0) == bytes([150]) * BLOCK


def test_discarded_space_is_the_file_systems_again(qcow2: Path) -> None:
    engine = open_engine(f"qcow2:{qcow2}")
    engine.write(memoryview(b"d" * (8 << 20)), 0)
    engine.flush()
    before = qcow2.stat().st_blocks

    engine.discard(0, 8 << 20)
    engine.flush()

    assert before - qcow2.stat().st_blocks > (4 << 20) // 512
    engine.close()


def test_it_is_resized_and_knows_its_size(qcow2: Path) -> None:
    engine = open_engine(f"qcow2:{qcow2}")

    engine.resize(2 * SIZE)

    assert (engine.measure(), engine.info.size) == (2 * SIZE, 2 * SIZE)
    engine.close()


def test_a_read_only_disk(qcow2: Path) -> None:
    first = open_engine(f"qcow2:{qcow2}", read_only=True)
    second = open_engine(f"qcow2:{qcow2}", read_only=True)

    assert (first.info.read_only, second.info.can_discard) == (True, False)
    first.close()
    second.close()


def opened(qcow2: Path) -> tuple[Checked, QemuEngine]:
    """An image's engine, and what its daemon serves."""
    engine = open_engine(f"qcow2:{qcow2}")
    assert isinstance(engine, Checked)
    assert isinstance(engine.lower, QemuEngine)
    return engine, engine.lower


def test_what_was_not_flushed_is_there_after_the_daemons_death(
    qcow2: Path, expect_log: Callable[[str], None]
) -> None:
    expect_log("storage daemon|not flushed")
    engine, served = opened(qcow2)
    for n in range(64):
        engine.write(memoryview(bytes([n]) * BLOCK), n * BLOCK * 16)

    kill(served)
    found = bytearray(BLOCK)
    for n in range(64):
        engine.read(memoryview(found), n * BLOCK * 16)
        assert found == bytes([n]) * BLOCK
    engine.close()


def test_zeros_that_were_not_flushed_are_there_after_the_daemons_death(
    qcow2: Path, expect_log: Callable[[str], None]
) -> None:
    expect_log("storage daemon|not flushed")
    engine, served = opened(qcow2)
    engine.write(memoryview(b"d" * (256 << 10)), 0)
    engine.write_zeroes(BLOCK, 128 << 10, unmap=True)
    engine.write(memoryview(b"e" * BLOCK), 2 * BLOCK)

    kill(served)
    found = bytearray(256 << 10)
    engine.read(memoryview(found), 0)
    engine.close()

    wanted = bytearray(b"d" * (256 << 10))
    wanted[BLOCK : BLOCK + (128 << 10)] = bytes(128 << 10)
    wanted[2 * BLOCK : 3 * BLOCK] = b"e" * BLOCK
    assert found == wanted


@pytest.mark.slow
def test_a_daemon_that_is_killed_under_load_costs_a_guest_time(
    qcow2: Path, img: Callable[..., str], expect_log: Callable[[str], None]
) -> None:
    expect_log("storage daemon|not flushed")

    async def work() -> None:
        front = FrontSettings(max_queues=2)
        async with disk_world() as world, await world.disk(f"qcow2:{qcow2}", front=front) as disk:
            engine, stop = qemu_of(world), asyncio.Event()
            contents = contents_of(disk, SIZE, 4)
            using = asyncio.ensure_future(load(contents, stop))
            for kills in range(1, 6):
                await until(lambda steps=kills * 50: contents[0].steps > steps or using.done())
                kill(engine)
            stop.set()
            await using
            assert world.server is not None
            assert world.server.device("1/51712").disk.counters().errors == 0
            data = b"".join(b"".join(content.blocks) for content in contents)
            qcow2.with_suffix(".raw").write_bytes(data)

    run(work())
    assert "identical" in img(
        "compare", "-f", "qcow2", "-F", "raw", qcow2, qcow2.with_suffix(".raw")
    )


def test_a_daemon_that_cannot_be_started_again_is_waited_for(
    qcow2: Path, expect_log: Callable[[str], None]
) -> None:
    expect_log("no other storage daemon: .*No such file or directory")
    expect_log("storage daemon|not flushed")
    away = qcow2.with_suffix(".away")

    async def work() -> None:
        async with disk_world() as world, await world.disk(f"qcow2:{qcow2}") as disk:
            engine = qemu_of(world)
            await disk.write(0, b"a" * BLOCK)
            os.rename(qcow2, away)
            kill(engine)
            reading = asyncio.ensure_future(disk.read(0, BLOCK))
            await until(lambda: engine.trouble != "")
            assert not reading.done()
            os.rename(away, qcow2)
            assert await reading == b"a" * BLOCK
            await until(lambda: engine.trouble == "")

    run(work())


def test_storage_is_exchanged_for_an_image_of_another_format(qcow2: Path, tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(b"r" * SIZE)

    async def work() -> None:
        async with disk_world() as world, await world.disk(str(raw)) as disk:
            assert world.server is not None
            life = world.server.device("1/51712").life
            await life.swap(f"qcow2:{qcow2}", 10)
            assert await disk.read(0, 512) == bytes(512)
            await disk.write(0, b"q" * 512)
            await life.swap(str(raw), 10)
            assert await disk.read(0, 512) == b"r" * 512

    run(work())
    engine = open_engine(f"qcow2:{qcow2}")
    found = bytearray(512)
    engine.read(memoryview(found), 0)
    engine.close()
    assert found == b"q" * 512


def test_a_paused_disks_image_can_be_read_by_others(
    qcow2: Path, tmp_path: Path, img: Callable[..., str]
) -> None:
    async def work() -> None:
        async with disk_world() as world, await world.disk(f"qcow2:{qcow2}") as disk:
            await disk.write(0, b"p" * SIZE)
            assert world.server is not None
            await world.server.device("1/51712").life.pause(10)
            await asyncio.to_thread(
                img, "convert", "-U", "-f", "qcow2", "-O", "raw", qcow2, tmp_path / "copy"
            )
            await world.server.device("1/51712").life.resume()

    run(work())
    assert (tmp_path / "copy").read_bytes() == b"p" * SIZE


# ---- What is wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "error", "said"),
    [
        ("qcow2:/no/such.qcow2", EngineError, "/no/such.qcow2: No such file or directory"),
        ("luks:/a.img", ConfigError, "where is its passphrase"),
        ("luks:/a.img,key-file=/no/key", ConfigError, "there is no key file /no/key"),
        ("nbd:/disk", ConfigError, "names no host; write nbd:HOST:PORT/EXPORT"),
        ("nbd+unix:///disk", ConfigError, "names no socket"),
        ("iscsi://portal/target", ConfigError, "write iscsi://PORTAL/TARGET/LUN"),
        ("nfs://host", ConfigError, "write nfs://HOST/PATH"),
        ("qemu:{", ConfigError, "is no JSON"),
        ("qemu:[1]", ConfigError, "is no block node: an object with a driver"),
    ],
)
def test_what_cannot_be_meant_is_said_without_a_daemon(
    uri: str, error: type[Exception], said: str
) -> None:
    with pytest.raises(error) as caught:
        open_engine(uri)

    assert said in str(caught.value)


def test_an_image_of_another_format_than_its_name_says(tmp_path: Path, requires_tool: Tool) -> None:
    requires_tool("qemu-storage-daemon")
    (tmp_path / "disk.img").write_bytes(bytes(SIZE))

    with pytest.raises(EngineError, match="Image is not in qcow2 format") as caught:
        open_engine(f"qcow2:{tmp_path}/disk.img")

    assert str(caught.value).startswith(f"{tmp_path}/disk.img: ")


def test_an_image_that_is_in_use(qcow2: Path) -> None:
    engine = open_engine(f"qcow2:{qcow2}")

    with pytest.raises(EngineError, match="it is in use") as caught:
        open_engine(f"qcow2:{qcow2}", patience_s=0.1)

    assert caught.value.errno == errno.EBUSY
    engine.close()


def test_a_host_without_the_storage_daemon(qcow2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "_PROGRAM", "qemu-storage-demon")

    with pytest.raises(EngineError, match="apt-get install qemu-system-common"):
        open_engine(f"qcow2:{qcow2}")
