# SPDX-License-Identifier: Apache-2.0
"""What becomes of a guest's rights when it is gone."""

from pathlib import Path

import pytest
from rig_disk import World, disk_world, run

from xvd.cli.rights import GuestRights
from xvd.cli.wanted import CommandLine
from xvd.errors import PeerClosed
from xvd.service.sandbox.equipment import Place
from xvd.types import Domid

STORAGE, GUEST = Domid(2), Domid(1)
WANTED = CommandLine(None, "process", [], False, [], [], [], 0).wanted()


async def rights_in(world: World, domid: Domid, place: Path) -> GuestRights:
    """The rights that a backend in a domain gives."""
    machine, store = await world.guest(domid)
    where = Place(machine, place, place / "states", ["vbd", "vbd3"], place)
    return GuestRights(WANTED, store, where, place / "control" / f"backend-{domid}")


def test_a_driver_domain_removes_a_guests_directory_once_it_is_empty(tmp_path: Path) -> None:
    """Nobody else does: libxl is in domain 0."""

    async def work() -> None:
        async with disk_world(serve=False) as world:
            rights = await rights_in(world, STORAGE, tmp_path)
            home = f"/local/domain/{STORAGE}/backend"
            await world.store.mkdir(f"{home}/vbd/{GUEST}")
            await world.store.mkdir(f"{home}/vbd3/{GUEST}/51712")
            for path in ("", "/vbd", "/vbd3", f"/vbd/{GUEST}", f"/vbd3/{GUEST}"):
                await world.store.set_perms(f"{home}{path}", [f"n{STORAGE}"])

            await rights.gone("1", [GUEST])

            assert await world.store.ls(f"{home}/vbd") == []
            assert await world.store.ls(f"{home}/vbd3") == [str(GUEST)]

    run(work())


def test_a_driver_domain_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    """libxl keeps the directories above a disk's to domain 0."""

    async def work() -> None:
        async with disk_world(serve=False) as world:
            rights = await rights_in(world, STORAGE, tmp_path)
            above = f"/local/domain/{STORAGE}/backend/vbd"
            await world.store.mkdir(f"{above}/{GUEST}")
            for path in (above, f"{above}/{GUEST}"):
                await world.store.set_perms(path, ["n0", f"r{STORAGE}"])

            await rights.gone("1", [GUEST])

            assert await world.store.ls(above) == [str(GUEST)]

    run(work())


def test_domain_0_leaves_a_guests_directory_to_the_toolstack(tmp_path: Path) -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world:
            place = Place(world.dom0, tmp_path, tmp_path / "states", ["vbd"], tmp_path)
            rights = GuestRights(WANTED, world.store, place, tmp_path / "control/backend-0")
            await world.store.mkdir(f"backend/vbd/{GUEST}")

            await rights.gone("1", [GUEST])

            assert await world.store.exists(f"backend/vbd/{GUEST}")

    run(work())


def test_nothing_is_named_for_a_guest_that_is_gone(tmp_path: Path) -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world:
            rights = await rights_in(world, STORAGE, tmp_path)
            with pytest.raises(PeerClosed, match="the guest has no disk any more"):
                rights._hear("1", "swap", "1/51712", "/a.img")
            assert not (tmp_path / "states").exists()

    run(work())
