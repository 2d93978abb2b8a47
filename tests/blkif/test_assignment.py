# SPDX-License-Identifier: Apache-2.0
"""What a toolstack writes for either end, as libxl and xapi write it."""

import pytest

from xvd.blkif.assignment import (
    parse_backend_assignment,
    parse_frontend_assignment,
    parse_xl_params,
    writable_mode,
)
from xvd.errors import ConfigError

ASSIGNED = {
    "frontend": "/local/domain/7/device/vbd/51712",
    "frontend-id": "7",
    "online": "1",
    "mode": "w",
    "params": "aio:/images/a:b.img",
    "dev": "xvda",
}


def test_a_disk_as_libxl_hands_it_over() -> None:
    disk = parse_backend_assignment(ASSIGNED)

    assert (disk.frontend_domid, disk.online, disk.writable, disk.cdrom) == (7, True, True, False)
    assert (disk.image_format, disk.image, disk.name) == ("raw", "/images/a:b.img", "xvda")
    assert disk.discard_enable


def test_a_frontend_in_another_domain_is_refused() -> None:
    with pytest.raises(ConfigError, match="must lie below /local/domain/7/"):
        parse_backend_assignment(ASSIGNED | {"frontend": "/local/domain/77/device/vbd/1"})


def test_a_missing_toolstack_node_is_named() -> None:
    with pytest.raises(ConfigError, match="backend node frontend-id is missing"):
        parse_backend_assignment({})


@pytest.mark.parametrize(
    ("found", "vdev"),
    [({"virtual-device": "51712"}, 51712), ({"virtual-device-ext": "268439552"}, 268439552)],
)
def test_a_frontends_part(found: dict[str, str], vdev: int) -> None:
    disk = parse_frontend_assignment(found | {"backend": "/b", "backend-id": "0"})

    assert (disk.vdev, disk.trusted, disk.cdrom) == (vdev, True, False)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ("/dev/vg/lv", ("raw", "/dev/vg/lv")),
        ("aio:/d.img", ("raw", "/d.img")),
        ("vhd:/d.vhd", ("vpc", "/d.vhd")),
        ("qcow2:/d.qcow2", ("qcow2", "/d.qcow2")),
        ("rbd:pool/image:id=x", ("rbd", "pool/image:id=x")),
        ("/odd:name", ("raw", "/odd:name")),
        ("aio:", ("raw", "")),
        ("", ("raw", "")),
    ],
)
def test_params(params: str, expected: tuple[str, str]) -> None:
    assert parse_xl_params(params) == expected


@pytest.mark.parametrize(
    ("mode", "writable"), [("w", True), ("w!", True), ("rw", True), ("r", False)]
)
def test_mode(mode: str, writable: bool) -> None:
    assert writable_mode(mode) is writable
