# SPDX-License-Identifier: Apache-2.0
"""What storage a disk's ``params`` node names, however the toolstack has written it."""

import asyncio
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from rig_disk import disk_world, run

from xvd.blkif.assignment import parse_backend_assignment
from xvd.engines.uri import open_assigned, storage_uri
from xvd.toolstack.vbd import has_device_model
from xvd.types import Domid

ASSIGNED = {"frontend": "/local/domain/7/device/vbd/51712", "frontend-id": "7"}


@pytest.mark.parametrize(
    ("params", "uri"),
    [
        ("/images/a.img", "/images/a.img"),
        ("/images/a:b.img", "/images/a:b.img"),
        ("memory:64M", "memory:64M"),
        ("aio:/images/a.img", "/images/a.img"),
        ("aio:memory:64M", "memory:64M"),
        ("file:/images/a.img", "/images/a.img"),
        ("aio:file:/images/a:b.img", "file:/images/a:b.img"),
    ],
)
def test_a_target_is_an_engines_uri_or_a_path(params: str, uri: str) -> None:
    assert storage_uri(parse_backend_assignment(ASSIGNED | {"params": params})) == uri


def test_the_device_model_of_a_guest_has_its_image_too(
    tmp_path: Path, requires_tool: Callable[[str], str]
) -> None:
    """An HVM guest's QEMU is not kept away, and does not keep us away; any other one is."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    qemu_img = requires_tool("qemu-img")
    command = [qemu_img, "bench", "-w", "-c", "1", "-f", "raw", str(path)]

    async def status(kind: str) -> int:
        async with disk_world(serve=False) as world:
            await world.store.write("/libxl/7/type", kind)
            nodes = ASSIGNED | {"params": str(path), "mode": "w"}
            assignment = parse_backend_assignment(nodes)
            beside_qemu = await has_device_model(world.store, Domid(7))
            engine = open_assigned(assignment, device_model=beside_qemu)
            process = await asyncio.create_subprocess_exec(
                *command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            found = await process.wait()
            engine.close()
            return found

    assert [run(status(kind)) for kind in ("hvm", "pvh", "pv")] == [0, 1, 1]
