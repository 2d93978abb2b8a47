# SPDX-License-Identifier: Apache-2.0
"""A real file system on the export: nbdfuse makes a file of it, a loop device a disk of that."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuse_file import fuse_file
from nbd_support import missing, require, run
from served_disk import served_disk

from xvd.export.nbd import NbdServer

pytestmark = [pytest.mark.tools, pytest.mark.slow]

LIBRARY = Path(os.__file__).parent
TREE = ("asyncio", "email", "encodings", "lib2to3", "unittest", "xml")
"""Directories of Python's own library: some hundred files of all sizes."""
SIZE = 320 << 20
CHECKS = {"ext4": ("e2fsck", "-fn"), "xfs": ("xfs_repair", "-n")}
_NO_CACHES = shutil.ignore_patterns("__pycache__")


@contextlib.contextmanager
def loop_device(path: Path) -> Iterator[str]:
    device = run("losetup", "-f", "--show", path).strip()
    try:
        yield device
    finally:
        run("losetup", "-d", device)


@contextlib.contextmanager
def mounted(device: str, directory: Path) -> Iterator[Path]:
    directory.mkdir(exist_ok=True)
    run("mount", device, directory)
    try:
        yield directory
    finally:
        run("umount", directory)


def require_loop_devices() -> None:
    require("nbdfuse", "fusermount3", "losetup", "mount", "diff")
    if os.geteuid() != 0:
        missing("mounting needs root")
    for device in ("/dev/fuse", "/dev/loop-control"):
        if not Path(device).exists():
            missing(f"there is no {device}: modprobe {Path(device).name.split('-')[0]}")


async def figures(server: NbdServer) -> dict[str, int]:
    return server.counters()


def storage(kind: str, place: Path) -> str:
    image = place / "disk.img"
    with image.open("wb") as file:
        file.truncate(SIZE)
    if kind != "qcow2":
        return f"memory:{SIZE}" if kind == "memory" else str(image)
    require("qemu-storage-daemon", "qemu-img")
    overlay = place / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "raw", overlay)
    return f"qcow2:{overlay}"


def require_file_system(name: str) -> None:
    require(f"mkfs.{name}", CHECKS[name][0])
    if name not in Path("/proc/filesystems").read_text().split():
        pytest.skip(f"this kernel has no {name}")


@pytest.mark.parametrize(
    ("kind", "name"),
    [("memory", "ext4"), ("file", "ext4"), ("qcow2", "ext4"), ("qcow2", "xfs")],
)
def test_a_file_system_keeps_a_tree_and_is_clean(kind: str, name: str, tmp_path: Path) -> None:
    require_loop_devices()
    require_file_system(name)
    target = storage(kind, tmp_path)
    with served_disk(target, tmp_path) as served:
        with fuse_file(served.uri, tmp_path / "fuse") as file, loop_device(file.path) as device:
            run(f"mkfs.{name}", "-q", device)
            with mounted(device, tmp_path / "fs") as root:
                for part in TREE:
                    shutil.copytree(LIBRARY / part, root / part, ignore=_NO_CACHES)
            with mounted(device, tmp_path / "fs") as root:
                for part in TREE:
                    run("diff", "-r", "-x", "__pycache__", LIBRARY / part, root / part)
            run(*CHECKS[name], device)
        # By name, with those of a client that is only just leaving.
        assert served.call(figures(served.server))["bytes_written"] > 1 << 20
    if kind == "qcow2":
        run("qemu-img", "check", "-q", target.removeprefix("qcow2:"))
