# SPDX-License-Identifier: Apache-2.0
"""Images of other formats are not served as they lie, unless the user says that they are raw."""

import errno
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from xvd.blkif.assignment import parse_backend_assignment
from xvd.engines.formats import FORMATS, known_format
from xvd.engines.image import FileEngine
from xvd.engines.uri import open_engine, storage_uri
from xvd.errors import EngineError

MIB = 1 << 20

BYTES = {
    "qcow": (0, b"QFI\xfb\0\0\0\1"),
    "qcow2": (0, b"QFI\xfb\0\0\0\3"),
    "qed": (0, b"QED\0"),
    "vhdx": (0, b"vhdxfile"),
    "vmdk": (0, b"COWD"),
    "vdi": (64, b"\x7f\x10\xda\xbe"),
    "vhd": (MIB - 512, b"conectix"),
    "dmg": (MIB - 512, b"koly"),
    "parallels": (0, b"WithouFreSpacExt"),
    "bochs": (0, b"Bochs Virtual HD Image"),
    "cloop": (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0"),
    "luks": (0, b"LUKS\xba\xbe\0\2"),
}


def image(tmp_path: Path, offset: int, data: bytes, size: int = MIB) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(offset) + data + bytes(size - offset - len(data)))
    return path


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_what_looks_like_another_format_is_refused(
    tmp_path: Path, name: str, read_only: bool
) -> None:
    path = image(tmp_path, *BYTES[name])

    with pytest.raises(EngineError) as caught:
        open_engine(str(path), read_only=read_only)

    text = caught.value.strerror or ""
    assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, str(path))
    assert text.startswith(f"it begins or ends as a {name} image does")
    for remedy in (f"{name}:{path}", f"qemu-img convert -f {FORMATS[name].driver}", "raw:"):
        assert remedy in text


@pytest.mark.parametrize("name", FORMATS)
def test_it_is_served_if_the_user_says_that_it_is_raw(tmp_path: Path, name: str) -> None:
    path = image(tmp_path, *BYTES[name])

    engine = open_engine(f"raw:{path}")

    assert engine.info.size == MIB
    engine.close()


@pytest.mark.parametrize("size", [1000, MIB - 1, MIB + 100])
def test_nobody_is_told_to_pad_an_image_of_another_format(tmp_path: Path, size: int) -> None:
    path = image(tmp_path, 0, b"QFI\xfb\0\0\0\3", size)

    with pytest.raises(EngineError, match="a qcow2 image") as caught:
        FileEngine(str(path))

    assert "truncate" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (("-f", "qcow"), "qcow"),
        (("-f", "qcow2"), "qcow2"),
        (("-f", "qcow2", "-o", "compat=0.10"), "qcow2"),
        (("-f", "qed"), "qed"),
        (("-f", "vhdx"), "vhdx"),
        (("-f", "vdi"), "vdi"),
        (("-f", "vpc"), "vhd"),
        (("-f", "vpc", "-o", "subformat=fixed"), "vhd"),
        (("-f", "vmdk"), "vmdk"),
        (("-f", "vmdk", "-o", "subformat=monolithicFlat"), "vmdk"),
        (("-f", "parallels"), "parallels"),
    ],
    ids=" ".join,
)
def test_what_qemu_makes_is_known(
    tmp_path: Path, requires_tool: Callable[[str], str], options: tuple[str, ...], name: str
) -> None:
    path = tmp_path / "disk"
    qemu_img = requires_tool("qemu-img")
    subprocess.run([qemu_img, "create", "-q", *options, str(path), "4M"], check=True)

    with path.open("rb") as file:
        assert known_format(file.fileno()) == name


@pytest.mark.parametrize("text", ["# a comment\n\n# another\nversion=1\nCID=1\n", "version=3\n"])
def test_a_text_that_names_the_parts_of_a_vmdk(tmp_path: Path, text: str) -> None:
    with image(tmp_path, 0, text.encode()).open("rb") as file:
        assert known_format(file.fileno()) == "vmdk"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xeb\x63\x90",
        b"QFI\xfb\0\0\0\4",
        b"QEMU",
        b"version=10\n",
        b"x\nversion=1\n",
        b"KDM",
        bytes(range(0x41, 0x61)),
    ],
)
def test_a_disk_of_somebody_is_raw(tmp_path: Path, data: bytes) -> None:
    with image(tmp_path, 0, data).open("rb") as file:
        assert known_format(file.fileno()) == ""


@pytest.mark.parametrize("size", [512, 1024])
def test_the_smallest_disks_have_no_footer_to_look_at(tmp_path: Path, size: int) -> None:
    engine = FileEngine(str(image(tmp_path, 0, b"data", size)))

    assert engine.info.size == size
    engine.close()


ASSIGNED = {"frontend": "/local/domain/7/device/vbd/51712", "frontend-id": "7"}


@pytest.mark.parametrize(
    ("params", "state", "uri"),
    [
        ("/a.img", "1", "/a.img"),
        ("aio:/a.img", "1", "/a.img"),
        ("file:/a.img", "1", "/a.img"),
        ("raw:/a.img", "1", "raw:/a.img"),
        ("aio:raw:/a.img", "1", "raw:/a.img"),
        ("qcow2:/a.img", "1", "qcow2:/a.img"),
        ("vhd:/a.img", "1", "vpc:/a.img"),
        ("aio:memory:1M", "4", "memory:1M"),
        # What a guest has written on its disk meanwhile is no reason to refuse it.
        ("aio:/a.img", "2", "raw:/a.img"),
        ("/a.img", "4", "raw:/a.img"),
        # A disk that was refused stays refused.
        ("/a.img", "5", "/a.img"),
        ("/a.img", "6", "/a.img"),
    ],
)
def test_who_says_that_an_image_is_raw(params: str, state: str, uri: str) -> None:
    nodes = ASSIGNED | {"params": params, "state": state}
    assert storage_uri(parse_backend_assignment(nodes)) == uri
