# SPDX-License-Identifier: Apache-2.0
"""What this host itself writes to is not opened for writing. Needs root and loop devices."""

import errno
import os
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from xvd.engines.image import FileEngine
from xvd.engines.uri import open_engine
from xvd.errors import EngineError

MIB = 1 << 20


class Host:
    """Loop devices and mounts, undone in the end."""

    def __init__(self, where: Path, requires_tool: Callable[[str], str]) -> None:
        self.where = where
        self._tool = requires_tool
        self._undo = ExitStack()

    def run(self, tool: str, *arguments: str | Path) -> str:
        command = [self._tool(tool), *map(str, arguments)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def image(self, name: str = "disk.img") -> Path:
        path = self.where / name
        path.touch()
        os.truncate(path, 16 * MIB)
        return path

    def loop(self, image: Path, *options: str) -> str:
        name = self.run("losetup", *options, "-f", "--show", image)
        self._undo.callback(self.run, "losetup", "-d", name)
        return name

    def partition(self, disk: str, number: int) -> str:
        """Its node; one of our own, as there may be nobody who makes nodes here."""
        name = Path(disk).name
        dev = Path(f"/sys/block/{name}/{name}p{number}/dev")
        if not dev.exists():
            pytest.skip("this kernel finds no partitions on loop devices")
        text = dev.read_text()
        node = self.where / f"p{number}"
        os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(*map(int, text.split(":"))))
        return str(node)

    def mount(self, device: str) -> Path:
        self.run("mkfs.ext4", "-q", "-F", device)
        where = self.where / "mounted"
        where.mkdir()
        self.run("mount", device, where)
        self._undo.callback(self.run, "umount", where)
        return where

    def swap(self, path: Path | str) -> None:
        self.run("mkswap", path)
        self.run("swapon", path)
        self._undo.callback(self.run, "swapoff", path)

    def undo(self) -> None:
        self._undo.close()


@pytest.fixture
def host(tmp_path: Path, requires_tool: Callable[[str], str]) -> Iterator[Host]:
    if os.geteuid() != 0:
        pytest.skip("loop devices and mounts need root")
    made = Host(tmp_path, requires_tool)
    yield made
    made.undo()


def write_partitions(image: Path, *parts: tuple[int, int]) -> None:
    """A table of (first sector, sectors) as a PC's: four entries from byte 446 on, then 55 aa."""
    entries = b"".join(struct.pack("<4xB3xII", 0x83, *part) for part in parts)
    with image.open("r+b") as file:
        file.seek(446)
        file.write(entries.ljust(64, b"\0") + b"\x55\xaa")


def refused(path: Path | str, number: int, *words: str) -> None:
    """To be written; to be read it is open to anybody, as it is for the kernel."""
    with pytest.raises(EngineError) as caught:
        FileEngine(str(path))
    assert (caught.value.errno, caught.value.filename) == (number, str(path))
    for word in (*words, "read-only (-r"):
        assert word in (caught.value.strerror or "")
    FileEngine(str(path), read_only=True).close()


def test_a_mounted_device(host: Host) -> None:
    device = host.loop(host.image())
    where = host.mount(device)

    refused(device, errno.EBUSY, f"({device} is mounted on {where})", "unmount it")


def test_the_disk_of_a_mounted_partition_and_the_other_way_round(host: Host) -> None:
    image = host.image()
    write_partitions(image, (2048, 16384), (18432, 8192))
    disk = host.loop(image, "-P")
    first, second = (host.partition(disk, number) for number in (1, 2))
    where = host.mount(first)

    text = f"(/dev/{Path(disk).name}p1 is mounted on {where})"
    refused(disk, errno.EBUSY, text)
    refused(first, errno.EBUSY, text)
    FileEngine(second).close()


def test_a_file_below_a_loop_device_that_is_mounted(host: Host) -> None:
    image = host.image()
    device = host.loop(image)
    FileEngine(str(image)).close()  # nobody uses the device yet
    host.mount(device)
    another = host.where / "another name"
    another.hardlink_to(image)

    refused(another, errno.EBUSY, f"it lies below {device}, which this host uses")


def test_a_device_below_a_loop_device_that_is_mounted(host: Host) -> None:
    lower = host.loop(host.image())
    upper = host.loop(Path(lower))
    host.mount(upper)

    refused(lower, errno.EBUSY, f"it lies below {upper}")


def test_a_device_that_is_served_cannot_be_mounted_or_served_again(host: Host) -> None:
    device = host.loop(host.image())
    engine = FileEngine(device, user="1/xvda")

    with pytest.raises(OSError, match="busy"):
        os.open(device, os.O_RDONLY | os.O_EXCL)
    with pytest.raises(EngineError, match="this daemon's disk 1/xvda"):
        FileEngine(device)
    engine.close()
    FileEngine(device).close()


def test_a_loop_device_on_a_file_that_somebody_has(host: Host) -> None:
    image = host.image()
    device = host.loop(image)
    engine = FileEngine(str(image), user="1/xvda")

    with pytest.raises(EngineError, match=f"{image}, which lies below it, is in use by this daem"):
        FileEngine(device)
    engine.close()
    FileEngine(device).close()


@pytest.mark.parametrize("kind", ["file", "device"])
def test_what_is_swapped_to(host: Host, kind: str) -> None:
    image = host.image("swap of a höst")
    image.write_bytes(bytes(16 * MIB))
    image.chmod(0o600)
    path = image if kind == "file" else Path(host.loop(image))
    try:
        host.swap(path)
    except subprocess.CalledProcessError:
        pytest.skip("this machine swaps to no such thing")

    if kind == "file":
        refused(path, errno.ETXTBSY, f"this host swaps to it; stop that: swapoff {path}")
    else:
        refused(path, errno.EBUSY, "this host uses the device")


def test_a_device_that_is_set_read_only(host: Host) -> None:
    device = host.loop(host.image(), "-r")

    refused(device, errno.EROFS, "the device is set read-only", f"blockdev --setrw {device}")


def test_a_refused_device_is_given_back(host: Host) -> None:
    device = host.loop(host.image())
    host.mount(device)
    before = len(os.listdir("/proc/self/fd"))

    for _ in range(3):
        with pytest.raises(EngineError):
            FileEngine(device)

    assert len(os.listdir("/proc/self/fd")) == before


def test_a_device_with_an_image_format_is_kept_from_the_host(host: Host) -> None:
    device = host.loop(host.image())
    host.run("qemu-img", "create", "-q", "-f", "qcow2", device, "8M")
    engine = open_engine(f"qcow2:{device}")

    with pytest.raises(OSError, match="busy"):
        os.close(os.open(device, os.O_RDWR | os.O_EXCL))

    engine.close()
    engine.close()
    os.close(os.open(device, os.O_RDWR | os.O_EXCL))


def test_an_image_format_on_a_device_that_is_mounted(host: Host) -> None:
    device = host.loop(host.image())
    host.mount(device)

    with pytest.raises(EngineError, match="this host uses the device") as caught:
        open_engine(f"qcow2:{device}")

    assert caught.value.errno == errno.EBUSY
