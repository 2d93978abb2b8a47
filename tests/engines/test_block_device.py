# SPDX-License-Identifier: Apache-2.0
"""Discards of block devices: a loop device takes ordinary ones and no secure ones.

No device that erases securely can be had without hardware. What stands for one answers its two
ioctls as Linux does for it, and passes everything else to the loop device.
"""

import errno
import fcntl
import os
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rig_disk import disk_world, run
from rig_queue import ALL, QueueWorld, discard, rq

from xvd.blkif.abi import Op, Status
from xvd.blkif.operations import OFFER_SECURE
from xvd.engines import block
from xvd.engines.checked import Checked
from xvd.engines.image import FileEngine

SIZE = 1 << 20
SECURE = OFFER_SECURE


@pytest.fixture
def loop(tmp_path: Path, requires_tool: Callable[[str], str]) -> Iterator[Callable[..., str]]:
    """`loop(option...)` is a loop device of 1 MiB on a file full of data."""
    losetup = requires_tool("losetup")
    if os.geteuid() != 0:
        pytest.skip("a loop device needs root")
    image = tmp_path / "disk.img"
    image.write_bytes(b"\xa5" * SIZE)
    made: list[str] = []

    def make(*options: str) -> str:
        command = [losetup, *options, "-f", "--show", str(image)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        made.append(output.strip())
        return made[-1]

    yield make
    for name in made:
        subprocess.run([losetup, "-d", name], check=True)


@pytest.fixture
def device(loop: Callable[..., str]) -> str:
    return loop()


class Erasing:
    """`fcntl.ioctl` of a loop device that takes secure discards, or claims to."""

    def __init__(self, failing: int = 0) -> None:
        self.failing = failing
        self.asked: list[tuple[int, int]] = []
        self.ready = threading.Event()
        self.ready.set()

    def __call__(self, fd: int, request: int, data: bytes) -> object:
        offset, length = struct.unpack("=QQ", data)
        if request == block.BLKSECDISCARD:
            if offset % 512 or length % 512:
                raise OSError(errno.EINVAL, "not whole sectors")
            self.asked.append((offset, length))
            assert self.ready.wait(10)
            if self.failing:
                raise OSError(self.failing, "the device says no")
            request = block.BLKDISCARD
        return fcntl.ioctl(fd, request, data)


def test_a_loop_device_discards_and_does_not_erase(device: str) -> None:
    engine = FileEngine(device)

    assert engine.info.can_discard
    assert not engine.info.can_secure_discard
    assert engine.info.discard_granularity == 4096
    engine.close()


def test_a_read_only_device_is_not_asked(device: str) -> None:
    engine = FileEngine(device, read_only=True)

    assert not engine.info.can_discard
    engine.close()


def test_a_discarded_range_of_a_device_is_freed_below(device: str, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    before = image.stat().st_blocks
    with QueueWorld(Checked(FileEngine(device))) as world, world.running():
        world.send(discard(512, 1024))
        world.port.notify()
        [answer] = world.collect(1)

    assert answer.status == Status.OKAY
    assert image.stat().st_blocks == before - 1024
    assert image.read_bytes() == b"\xa5" * (SIZE // 4) + bytes(SIZE // 2) + b"\xa5" * (SIZE // 4)


def test_what_is_no_whole_block_of_a_device_is_left_alone(loop: Callable[..., str]) -> None:
    asked: list[bytes] = []

    def note(fd: int, request: int, data: bytes) -> None:
        asked.append(data)

    with Path(loop("-b", "4096")).open("r+b") as file:
        block.discard(file.fileno(), block.BLKDISCARD, 512, 12288, note)
        block.discard(file.fileno(), block.BLKDISCARD, 512, 4096, note)

    assert asked == [struct.pack("=QQ", 4096, 8192)]


def test_a_secure_discard_reaches_a_device_that_takes_them(device: str) -> None:
    ioctl = Erasing()
    engine = Checked(FileEngine(device, ioctl=ioctl))
    assert engine.info.can_secure_discard
    with QueueWorld(engine, offered=ALL | SECURE) as world, world.running():
        world.send(discard(8, 16, flag=1))
        world.port.notify()
        [answer] = world.collect(1)
        buffer = bytearray(3 * 4096)
        engine.read(memoryview(buffer), 0)

    assert answer.status == Status.OKAY
    assert ioctl.asked == [(4096, 8192)]
    assert buffer == b"\xa5" * 4096 + bytes(8192)


def test_a_device_that_is_long_at_it_does_not_hold_up_the_queue(device: str) -> None:
    ioctl = Erasing()
    ioctl.ready.clear()
    engine = Checked(FileEngine(device, ioctl=ioctl))
    with QueueWorld(engine, offered=ALL | SECURE) as world, world.running():
        world.send(discard(8, 16, flag=1, id=1), rq(Op.READ, 0, world.segment(0), id=2))
        world.port.notify()
        [first] = world.collect(1)
        ioctl.ready.set()
        [second] = world.collect(1)

    assert (first.id, second.id) == (2, 1)


def test_a_device_that_turns_out_not_to_erase_is_asked_no_more(device: str) -> None:
    ioctl = Erasing(failing=errno.EOPNOTSUPP)
    engine = Checked(FileEngine(device, ioctl=ioctl))
    with QueueWorld(engine, offered=ALL | SECURE) as world, world.running():
        answers = []
        for number in (1, 2):
            world.send(discard(8, 16, flag=1, id=number))
            world.port.notify()
            answers += world.collect(1)
        world.send(discard(8, 16, id=3))
        world.port.notify()
        answers += world.collect(1)

        assert world.queue.withdrawn == SECURE
    assert [a.status for a in answers] == [Status.EOPNOTSUPP, Status.EOPNOTSUPP, Status.OKAY]
    assert len(ioctl.asked) == 1


def test_a_loop_device_that_is_told_to_erase_all_the_same_refuses(device: str) -> None:
    engine = FileEngine(device)

    with pytest.raises(OSError, match="not supported"):
        engine.secure_discard(0, 4096)
    engine.close()


def test_sectors_of_512_bytes_are_served_from_a_device_of_4096(
    loop: Callable[..., str], tmp_path: Path
) -> None:
    """Any frontend can use it: it sees ordinary sectors, and what is better for it to use."""

    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach(loop("-b", "4096"))
            async with await world.open(vbd) as disk:
                await disk.write(5 * 512, b"\x5a" * 512)
                await disk.flush()
                assert await disk.read(4 * 512, 1536) == edges
            nodes = [f"{vbd.backend}/{name}" for name in ("sector-size", "physical-sector-size")]
            assert [await world.store.read(node) for node in nodes] == ["512", "4096"]

    edges = b"\xa5" * 512 + b"\x5a" * 512 + b"\xa5" * 512
    run(work())
    assert (tmp_path / "disk.img").read_bytes()[4 * 512 : 7 * 512] == edges
