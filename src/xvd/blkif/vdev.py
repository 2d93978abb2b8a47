# SPDX-License-Identifier: Apache-2.0
"""Virtual device numbers: ``xvda1`` to 51713 and back, as the Xen toolstack counts.

The one idea: a number is a bus's base, a disk and a partition, and each bus is one row of
`_BUSES`. The vdev names the disk's directory in xenstore, and its low 16 bits are what a frontend
writes in ``handle``. Source: docs/man/xen-vbd-interface.7 and libxl's ``device_disk.c``.
"""

import re
from typing import Final, NamedTuple

from xvd.errors import ConfigError

__all__ = [
    "MAX_VDEV", "disk_name", "format_vdev", "handle", "parse_disk", "parse_vdev", "vdev_number",
]  # fmt: skip

MAX_VDEV: Final = (2 << 28) - 1
"""Numbers above this are reserved."""


class _Bus(NamedTuple):
    """Disks `first_disk` on, `disks` of them, at ``base | disk << partition_bits | partition``."""

    prefix: str
    base: int
    partition_bits: int
    first_disk: int
    disks: int


# Order matters to a name: xvda is tried in the compact form before the extended one.
_BUSES: Final = (
    _Bus("xvd", 202 << 8, 4, 0, 16),
    _Bus("sd", 8 << 8, 4, 0, 16),
    _Bus("hd", 3 << 8, 6, 0, 2),
    _Bus("hd", 22 << 8, 6, 2, 2),
)
_EXTENDED_BASE: Final = 1 << 28
_EXTENDED_BITS: Final = 8
_EXTENDED_DISKS: Final = 1 << 20
_NAME: Final = re.compile(r"(xvd|sd|hd)([a-z]{1,5})([1-9][0-9]{0,2})?", re.ASCII)
_NUMERIC: Final = re.compile(r"d([0-9]{1,7})(?:p([0-9]{1,3}))?", re.ASCII)
_PLAIN: Final = re.compile(r"0x[0-9a-f]{1,8}|[0-9]{1,10}", re.ASCII | re.IGNORECASE)


def _disk_of(letters: str) -> int:
    disk = 0
    for letter in letters:
        disk = disk * 26 + ord(letter) - ord("a") + 1
    return disk - 1


def _letters_of(disk: int) -> str:
    letters = ""
    disk += 1
    while disk:
        disk, letter = divmod(disk - 1, 26)
        letters = chr(ord("a") + letter) + letters
    return letters


def _compose(prefix: str, disk: int, partition: int, name: str) -> int:
    for bus in _BUSES:
        in_bus = 0 <= disk - bus.first_disk < bus.disks
        if bus.prefix == prefix and in_bus and partition < 1 << bus.partition_bits:
            return bus.base | (disk - bus.first_disk) << bus.partition_bits | partition
    if prefix == "xvd" and disk < _EXTENDED_DISKS and partition < 1 << _EXTENDED_BITS:
        return _EXTENDED_BASE | disk << _EXTENDED_BITS | partition
    limits = {"xvd": "1048576 disks of 255", "sd": "sda to sdp of 15", "hd": "hda to hdd of 63"}
    raise ValueError(
        f"no virtual device has the name {name!r}: {prefix} has {limits[prefix]} partitions;"
        " use an xvd name"
    )


def parse_vdev(text: str) -> int:
    """The number for a name as in a disk specification: ``xvda1``, ``sdb``, ``hdc2``, ``d0p1``,
    ``51712`` or ``0xca00``.

    ValueError, with what to write instead, for anything else and for numbers above `MAX_VDEV`.
    """
    if named := _NAME.fullmatch(text):
        prefix, letters, partition = named.groups()
        return _compose(prefix, _disk_of(letters), int(partition or 0), text)
    if numeric := _NUMERIC.fullmatch(text):
        return _compose("xvd", int(numeric[1]), int(numeric[2] or 0), text)
    if _PLAIN.fullmatch(text):
        number = int(text, 16 if text[:2].lower() == "0x" else 10)
        if number <= MAX_VDEV:
            return number
        raise ValueError(f"virtual device {text} is reserved: the highest number is {MAX_VDEV}")
    raise ValueError(f"{text!r} names no virtual device: write it as xvda, xvdb1, d2p1 or 51712")


def vdev_number(text: str) -> int:
    """Return what `parse_vdev` does; `ConfigError`, for a user, where that raises ValueError."""
    try:
        return parse_vdev(text)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def format_vdev(vdev: int) -> str:
    """The name of a number, ``xvda1``; plain decimal where no name has it.

    A disk below ``xvdq`` in the extended form has the same name as in the compact form.
    ValueError for a number outside 0..`MAX_VDEV`.
    """
    if not 0 <= vdev <= MAX_VDEV:
        raise ValueError(f"virtual device {vdev} is reserved: numbers are 0 to {MAX_VDEV}")
    if vdev >= _EXTENDED_BASE:
        disk, partition = divmod(vdev - _EXTENDED_BASE, 1 << _EXTENDED_BITS)
        return f"xvd{_letters_of(disk)}{partition or ''}"
    for bus in _BUSES:
        disk, partition = divmod(vdev - bus.base, 1 << bus.partition_bits)
        if 0 <= disk < bus.disks:
            return f"{bus.prefix}{_letters_of(disk + bus.first_disk)}{partition or ''}"
    return str(vdev)


def disk_name(domid: int | str, path: str) -> str:
    """Name a disk, as ``1/xvda``, from a guest's number and a path that ends with the vdev's.

    What is no number stays as it is.
    """
    last = path.rpartition("/")[2]
    known = last.isascii() and last.isdigit() and int(last) <= MAX_VDEV
    return f"{domid}/{format_vdev(int(last)) if known else last}"


def parse_disk(text: str) -> str:
    """``1/51712`` from ``1/xvda``: a guest by its number or its name, and a virtual device.

    ValueError, with what to write instead, for anything else.
    """
    guest, _, vdev = text.rpartition("/")
    if not re.fullmatch(r"[^/\s]+", guest):
        raise ValueError(f"{text!r} names no disk; write DOMID/VDEV or NAME/VDEV, as 1/xvda")
    return f"{int(guest) if guest.isascii() and guest.isdigit() else guest}/{parse_vdev(vdev)}"


def handle(vdev: int) -> int:
    """Return the ``handle`` of a frontend's requests: the low 16 bits. Backends ignore it."""
    return vdev & 0xFFFF
