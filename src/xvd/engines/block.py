# SPDX-License-Identifier: Apache-2.0
"""What a block device can do that a file cannot, asked of Linux: discards and their units.

Punching a hole in a device is a write of zeros (blkdev_fallocate), which a device that can only
discard refuses and another may carry out slowly; so these are the ioctls that blkback's own calls
stand behind. They block for as long as the device takes.
"""

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from xvd.types import RING_SECTOR_SIZE

BLKDISCARD: Final = 0x1277
BLKSECDISCARD: Final = 0x127D
BLKSSZGET: Final = 0x1268
BLKPBSZGET: Final = 0x127B

Ioctl = Callable[[int, int, bytes], object]
"""`fcntl.ioctl`, or what stands for a device that is not to be had: descriptor, request, range."""


def get_int(fd: int, request: int, default: int) -> int:
    """A number that a device tells; `default` if it does not."""
    buffer = bytearray(4)
    try:
        fcntl.ioctl(fd, request, buffer)
    except OSError:
        return default
    return int(struct.unpack("i", buffer)[0]) or default


def takes(fd: int, request: int, ioctl: Ioctl = fcntl.ioctl) -> bool:
    """Whether a device that is open for writing takes BLKDISCARD or BLKSECDISCARD.

    Nothing else tells of the second. Asked for one byte at byte 1, Linux says EOPNOTSUPP if the
    device cannot, and only then EINVAL. Before 5.19 it says EINVAL to a secure discard of any
    device that can discard: such a one is found out by the first that a guest sends.
    """
    try:
        ioctl(fd, request, struct.pack("=QQ", 1, 1))
    except OSError as error:
        return error.errno == errno.EINVAL
    return False


def discard(fd: int, request: int, offset: int, length: int, ioctl: Ioctl = fcntl.ioctl) -> None:
    """Discard a range of bytes and wait for it; raises OSError.

    What is not whole blocks of the device is left alone by BLKDISCARD, which promises nothing, and
    fails with BLKSECDISCARD, which does.
    """
    if request == BLKDISCARD:
        block = get_int(fd, BLKSSZGET, RING_SECTOR_SIZE)
        start, end = -(-offset // block) * block, (offset + length) // block * block
        offset, length = start, end - start
    if length > 0:
        ioctl(fd, request, struct.pack("=QQ", offset, length))


def discard_units(fd: int) -> tuple[int, int]:
    """(granularity, alignment) in bytes of a device's discards, as sysfs tells."""
    number = os.fstat(fd).st_rdev
    node = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    block = get_int(fd, BLKSSZGET, RING_SECTOR_SIZE)
    granularity = alignment = 0
    with suppress(OSError, ValueError):
        # A partition's limits are those of its disk, which is the directory above.
        queue = node / "queue" if (node / "queue").exists() else node.resolve().parent / "queue"
        granularity = int((queue / "discard_granularity").read_text())
        alignment = int((node / "discard_alignment").read_text())
    return granularity or block, alignment % (granularity or block)
