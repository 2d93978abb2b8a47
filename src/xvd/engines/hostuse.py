# SPDX-License-Identifier: Apache-2.0
"""What this host itself does with an image or a device: a second writer would destroy it.

The kernel lets one holder at a time claim a block device: a mount, swap, md, device mapper, or
whoever opens it with O_EXCL; a claim on a partition is one on its disk too. A file can be swap, or
lie below a loop device that somebody has claimed.
"""

import errno
import fcntl
import os
import re
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from xvd.errors import EngineError

BLKROGET: Final = 0x125E
_LOOP_GET_STATUS64: Final = 0x4C05
_LOOP_INFO64: Final = 232
"""Bytes of linux/loop.h's loop_info64, which begins with lo_device, lo_inode, lo_rdevice (u64)."""
_ESCAPED: Final = re.compile(rb"\\([0-3][0-7]{2})")
_RETRY_S: Final = 0.05


def claim(fd: int, path: str, patience_s: float) -> int:
    """Claim the block device behind `fd` for writing; a descriptor that holds the claim.

    It is waited for as long as a predecessor may need to end. Raises `EngineError`.
    """
    if fcntl.ioctl(fd, BLKROGET, bytes(4)) != bytes(4):
        raise EngineError(
            errno.EROFS,
            "the device is set read-only; open it read-only (-r, access=ro), or allow writing: "
            f"blockdev --setrw {path}",
            path,
        )
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise EngineError(error.errno or errno.EIO, error.strerror or "", path) from None
        if time.monotonic() >= deadline:
            raise EngineError(errno.EBUSY, _in_use(fd), path)
        time.sleep(_RETRY_S)


def _in_use(fd: int) -> str:
    number = os.fstat(fd).st_rdev
    return (
        f"this host uses the device or a part of it{_whose(number)}; unmount it, or stop what uses "
        "it, or open it read-only (-r, access=ro)"
    )


def _whose(number: int) -> str:
    """Name the user, as far as the system tells."""
    node = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    parts = {node.name, *(part.parent.name for part in node.glob("*/partition"))}
    if (node / "partition").exists():
        parts.add(node.parent.name)
    numbers = {}
    for part in parts:
        with suppress(OSError):
            numbers[(Path("/sys/class/block") / part / "dev").read_text().strip()] = part
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
            fields = line.split()
            if fields[2] in numbers:
                return f" (/dev/{numbers[fields[2]]} is mounted on {fields[4]})"
    holders = [h.name for part in parts for h in Path(f"/sys/class/block/{part}/holders").glob("*")]
    return f" (it is a part of {', '.join(sorted(holders))})" if holders else ""


def below(fd: int) -> str:
    """The file that a loop device lies on, by its name; empty for any other device."""
    number = os.fstat(fd).st_rdev
    node = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/loop/backing_file")
    with suppress(OSError):
        return os.fsdecode(node.read_bytes().rstrip(b"\n"))
    return ""


def check_file(fd: int, path: str) -> None:
    """Refuse to write to a file or device that is swap, or lies below a loop device in use.

    Raises `EngineError`.
    """
    found = os.fstat(fd)
    if any(_same(found, name) for name in _swaps()):
        raise EngineError(
            errno.ETXTBSY,
            f"this host swaps to it; stop that: swapoff {path}; or open it read-only (-r)",
            path,
        )
    for loop in _loops_on(found):
        raise EngineError(
            errno.EBUSY,
            f"it lies below {loop}, which this host uses; unmount that one, or stop what uses it, "
            "or open the image read-only (-r, access=ro)",
            path,
        )


def _same(found: os.stat_result, name: str) -> bool:
    try:
        other = os.stat(name)
    except OSError:
        return False
    if stat.S_ISBLK(found.st_mode):
        return stat.S_ISBLK(other.st_mode) and other.st_rdev == found.st_rdev
    return (other.st_dev, other.st_ino) == (found.st_dev, found.st_ino)


def _swaps() -> list[str]:
    """Files and devices that are swapped to; blanks in their names are written as \\040."""
    try:
        lines = Path("/proc/swaps").read_bytes().splitlines()[1:]
    except OSError:
        return []
    names = (line.split()[0] for line in lines if line.split())
    return [os.fsdecode(_ESCAPED.sub(lambda m: bytes([int(m[1], 8)]), name)) for name in names]


def _loops_on(found: os.stat_result) -> Iterator[str]:
    """Loop devices on this file or device that somebody has claimed."""
    for node in Path("/sys/block").glob("loop*/loop/backing_file"):
        device = f"/dev/{node.parent.parent.name}"
        with suppress(OSError):
            if _is_below(found, device, node) and _is_claimed(device):
                yield device


def _is_below(found: os.stat_result, device: str, node: Path) -> bool:
    """By the kernel's record, which no renaming changes; by the name where it may not be asked."""
    try:
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return _same(found, os.fsdecode(node.read_bytes().rstrip(b"\n")))
    try:
        info = fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_LOOP_INFO64))
    finally:
        os.close(fd)
    file_system, inode, special = struct.unpack_from("=QQQ", info)
    if stat.S_ISBLK(found.st_mode):
        return bool(special == _encoded(found.st_rdev))
    return bool((file_system, inode) == (_encoded(found.st_dev), found.st_ino))


def _encoded(number: int) -> int:
    """A device number as the kernel gives it to programs (huge_encode_dev)."""
    major, minor = os.major(number), os.minor(number)
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def _is_claimed(device: str) -> bool:
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False
