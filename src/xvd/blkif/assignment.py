# SPDX-License-Identifier: Apache-2.0
"""What the toolstack says of a disk to either end: the nodes that it alone writes.

Both ends read them through `NODES` as they read each other's, but a wrong one is nobody's hostile
act: it raises `ConfigError`, naming the node. Sources: libxl_disk.c, xl-disk-configuration(5).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from xvd.blkif.abi import XenbusState
from xvd.blkif.nodes import Side, read_number, read_text, shown
from xvd.errors import ConfigError
from xvd.types import Domid

STORAGE: Final = "sm-data/xvd-storage"
"""What xvd is to open, of a disk that xapi attaches (toolstack/datapath.py): xenopsd puts into
``params`` what dom0 itself can open, which is a path or nothing."""

TOOLSTACK_NODES: Final = frozenset(
    {
        *("frontend", "frontend-id", "params", "script", "online", "removable", "bootable", "dev"),
        *("type", "mode", "device-type", "discard-enable", "direct-io-safe", "specification"),
        *("physical-device-path", "sm-data", STORAGE),
    }
)
"""In a backend's directory: what a backend reads there and has no reason to write."""


def writable_mode(mode: str) -> bool:
    """Whether the ``mode`` node allows writing: ``w``, ``rw`` and the historic ``w!`` do."""
    return "w" in mode


def parse_xl_params(params: str) -> tuple[str, str]:
    """Split the ``params`` node in (format, path): ``aio:/d.img`` is ("raw", "/d.img").

    Split at the first colon (a path may hold others); a bare path is raw. The toolstack's names
    aio, vhd and tap2 forms are turned into the format's own; any other is returned as it is. An
    empty path is a CD-ROM drive without a disc.
    """
    head, colon, path = params.partition(":")
    if not colon or "/" in head:
        return "raw", params
    return {"aio": "raw", "phy": "raw", "file": "raw", "vhd": "vpc"}.get(head, head), path


_SERVED: Final = tuple(
    str(int(state))
    for state in (XenbusState.INIT_WAIT, XenbusState.INITIALISED, XenbusState.CONNECTED)
)
"""States of a disk whose storage a backend has opened: what its bytes look like now is the guest's
own doing, and a backend that begins anew must not refuse it for that."""


@dataclass(frozen=True, slots=True)
class BackendAssignment:
    """A disk as the toolstack hands it to a backend.

    `format_said`: the image is raw whatever its bytes look like, as the toolstack says (``raw:``)
    or as a backend before us has served it. ``aio:`` does not say so: xl writes it by default.
    """

    frontend: str
    frontend_domid: Domid
    online: bool
    writable: bool
    cdrom: bool
    image_format: str
    format_said: bool
    image: str
    discard_enable: bool
    direct_io_safe: bool
    name: str


def with_image(assignment: BackendAssignment, uri: str, *, served: bool) -> BackendAssignment:
    """Put other storage in the place of the toolstack's. served: a backend has opened it before,
    and what its bytes look like now is the guest's doing."""
    image_format, image = parse_xl_params(uri)
    said = served or uri.startswith("raw:")
    return replace(assignment, image_format=image_format, image=image, format_said=said)


def parse_backend_assignment(nodes: Mapping[str, str]) -> BackendAssignment:
    """The toolstack's part of a backend directory.

    ConfigError naming the node: these are the toolstack's, so no peer is to blame. The frontend's
    path must lie in the frontend's own domain, or a wrong entry would serve a disk to another.
    """

    def read(name: str) -> int:
        return read_number(Side.BACKEND, nodes, name, ConfigError)

    domid = read("frontend-id")
    frontend = read_text(nodes, "frontend")
    if not frontend.startswith(f"/local/domain/{domid}/"):
        raise ConfigError(
            f"backend node frontend holds {shown(frontend)}:"
            f" it must lie below /local/domain/{domid}/, the domain of frontend-id"
        )
    params = read_text(nodes, STORAGE) or read_text(nodes, "params")
    state = read_text(nodes, "state")
    image_format, image = parse_xl_params(params)
    cdrom = read_text(nodes, "device-type") == "cdrom"
    return BackendAssignment(
        frontend=frontend,
        frontend_domid=Domid(domid),
        online=read("online") != 0,
        writable=writable_mode(read_text(nodes, "mode") or "r") and not cdrom,
        cdrom=cdrom,
        image_format=image_format,
        format_said=params.startswith("raw:") or state in _SERVED,
        image=image,
        discard_enable=read("discard-enable") != 0,
        direct_io_safe=read("direct-io-safe") != 0,
        name=read_text(nodes, "dev"),
    )


@dataclass(frozen=True, slots=True)
class FrontendAssignment:
    """A disk as the toolstack hands it to a frontend."""

    backend: str
    backend_domid: Domid
    vdev: int
    cdrom: bool
    trusted: bool


def parse_frontend_assignment(nodes: Mapping[str, str]) -> FrontendAssignment:
    """The toolstack's part of a frontend directory; ConfigError naming the node."""

    def read(name: str) -> int:
        return read_number(Side.FRONTEND, nodes, name, ConfigError)

    backend = read_text(nodes, "backend")
    if not backend.startswith("/"):
        raise ConfigError(f"frontend node backend holds {shown(backend)}: it must be a path")
    extended = not read_text(nodes, "virtual-device")
    return FrontendAssignment(
        backend=backend,
        backend_domid=Domid(read("backend-id")),
        vdev=read("virtual-device-ext" if extended else "virtual-device"),
        cdrom=read_text(nodes, "device-type") == "cdrom",
        trusted=read("trusted") != 0,
    )
