# SPDX-License-Identifier: Apache-2.0
"""A guest that migrates to its own host has its disk in two domains; nobody else has it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from rig_disk import World, disk_world, run, until

from xvd.errors import PeerClosed

GUEST = "/vm/5e8a2b1c-0000-4000-8000-000000000001"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


async def domain_of(world: World, domid: int, guest: str) -> None:
    """A domain that is the guest `guest`."""
    await world.guest(domid)
    await world.store.write(f"/local/domain/{domid}/vm", guest)


def test_both_domains_of_a_guest_have_its_disk(image: Path) -> None:
    async def work() -> None:
        async with disk_world() as world:
            for domid in (1, 2):
                await domain_of(world, domid, GUEST)
            old = await world.disk(str(image), domid=1)
            await old.write(0, b"before" * 1024)
            async with await world.disk(str(image), domid=2) as new:
                await old.close()
                await new.write(6144, b"after!" * 1024)
                assert await new.read(0, 12288) == b"before" * 1024 + b"after!" * 1024

    run(work())


@pytest.mark.parametrize(
    ("guest", "vdev"), [("/vm/another", "xvda"), (GUEST, "xvdb")], ids=["guest", "disk"]
)
def test_nobody_else_has_it(
    image: Path, guest: str, vdev: str, expect_log: Callable[[str], None]
) -> None:
    expect_log("the image is in use by this daemon's disk 1/xvda; detach that one first")

    async def work() -> None:
        async with disk_world() as world:
            await domain_of(world, 1, GUEST)
            await domain_of(world, 2, guest)
            async with await world.disk(str(image), domid=1):
                with pytest.raises(PeerClosed, match="in use"):
                    await world.attach(str(image), domid=2, vdev=vdev)

    run(work())


def test_the_image_is_free_when_the_last_has_closed(image: Path) -> None:
    async def work() -> None:
        async with disk_world() as world:
            for domid in (1, 2):
                await domain_of(world, domid, GUEST)
            vbds = [await world.attach(str(image), domid=domid) for domid in (1, 2)]
            for vbd in vbds:
                await world.store.write(f"{vbd.backend}/online", "0")
                await world.store.rm(vbd.frontend)
            server = world.server
            assert server is not None
            await until(lambda: not server.devices)
            await domain_of(world, 3, "/vm/another")
            async with await world.disk(str(image), domid=3) as disk:
                assert await disk.read(0, 512) == bytes(512)

    run(work())
