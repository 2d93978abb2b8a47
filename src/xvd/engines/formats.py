# SPDX-License-Identifier: Apache-2.0
"""Images whose bytes are not a disk's: how each is known, and how what is in it is served.

Served as it lies, such an image shows its guest a container, and the first write of the guest
destroys what is in there. What an image is, is never found out from the bytes: a guest can write
the first bytes of any format on its own disk. So an examination only refuses, and the user says
what it is.
"""

import os
from dataclasses import dataclass
from typing import Final

from xvd.types import RING_SECTOR_SIZE

_SECTOR: Final = RING_SECTOR_SIZE
_HEAD: Final = 4096
"""Bytes from the beginning that are examined: comments before the first line that counts fit."""
_VDI_AT: Final = 64


@dataclass(frozen=True, slots=True)
class Format:
    """One row: `driver` is QEMU's name of it, `form` how it is served."""

    driver: str
    form: str = "{name}:{path}"


FORMATS: Final[dict[str, Format]] = {
    "qcow": Format("qcow"),
    "qcow2": Format("qcow2"),
    "qed": Format("qed"),
    "vhd": Format("vpc"),
    "vhdx": Format("vhdx"),
    "vmdk": Format("vmdk"),
    "vdi": Format("vdi"),
    "parallels": Format("parallels"),
    "bochs": Format("bochs"),
    "cloop": Format("cloop"),
    "dmg": Format("dmg"),
    "luks": Format("luks", "luks:{path},key-file=FILE"),
}
"""What QEMU reads, by the name that people and xl use."""

# Of each format's own specification, and of QEMU's probes (block/*.c): bytes at an offset.
_SIGNATURES: Final = (
    (0, b"QFI\xfb\0\0\0\1", "qcow"),
    (0, b"QFI\xfb\0\0\0\2", "qcow2"),
    (0, b"QFI\xfb\0\0\0\3", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vhd"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (_VDI_AT, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", "cloop"),
)
_FOOTERS: Final = (
    (_SECTOR, b"conectix", "vhd"),
    (511, b"conectix", "vhd"),  # of Virtual PC before 2004
    (_SECTOR, b"koly", "dmg"),
)
"""Bytes so far from the end."""


def known_format(fd: int) -> str:
    """The format that an image's bytes are of, a key of `FORMATS`; empty if of none."""
    head = os.pread(fd, _HEAD, 0)
    for offset, signature, name in _SIGNATURES:
        if head.startswith(signature, offset):
            return name
    if _is_descriptor(head):
        return "vmdk"
    size = os.lseek(fd, 0, os.SEEK_END)
    if size > _SECTOR:
        # A device is read in whole sectors where it is not cached: ask for the last of them.
        tail = os.pread(fd, _SECTOR, size - _SECTOR)
        for distance, signature, name in _FOOTERS:
            if tail.startswith(signature, len(tail) - distance):
                return name
    return ""


def _is_descriptor(head: bytes) -> bool:
    """Whether it is the text that names the parts of a vmdk: comments, then its version."""
    lines = (line.strip() for line in head.split(b"\n"))
    first = next((line for line in lines if line and not line.startswith(b"#")), b"")
    return first in (b"version=1", b"version=2", b"version=3")


def remedy(name: str, path: str) -> str:
    """Say how what is in an image of this format is served, and how it is made raw."""
    row = FORMATS[name]
    form = row.form.format(name=name, path=path)
    return f"serve that: {form}, or make it raw: qemu-img convert -f {row.driver} -O raw {path} NEW"
