# SPDX-License-Identifier: Apache-2.0
"""A backend outside dom0, and what xentop is told of a disk."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rig_disk import World, disk_world, opener, run, until

from xvd.backend import server as server_module
from xvd.backend.counters import BackCounters
from xvd.backend.server import Server
from xvd.backend.xentop import PAGE, XentopPage, XentopPages
from xvd.errors import XenstoreError
from xvd.toolstack.vbd import attach, detach
from xvd.toolstack.xldisk import parse_xl_disk
from xvd.types import Domid

STORAGE, GUEST = Domid(2), Domid(1)


async def storage_domain(world: World) -> Server:
    """A backend in a domain of its own."""
    machine, store = await world.guest(STORAGE)
    server = Server(machine, store, opener())
    await server.start()
    return server


@pytest.mark.parametrize("owner", [Domid(0), STORAGE])
def test_a_disk_of_a_driver_domain_leaves_no_nodes(owner: Domid) -> None:
    """libxl keeps the directories above to domain 0: the driver domain may only read them."""

    async def work() -> None:
        async with disk_world(serve=False) as world:
            server = await storage_domain(world)
            await world.guest(GUEST)
            line = parse_xl_disk("vdev=xvda,access=rw,target=memory:8M")
            vbd = await attach(world.store, GUEST, line, backend_domid=STORAGE)
            above = f"/local/domain/{STORAGE}/backend/vbd"
            for path in (above, f"{above}/{GUEST}"):
                await world.store.set_perms(path, [f"n{owner}", f"r{STORAGE}"])
            async with await world.open(vbd) as disk:
                await disk.write(0, b"x" * 512)
            await world.store.write(f"{vbd.backend}/online", "0")
            await world.store.rm(vbd.frontend)
            async with await world.store.watch(vbd.backend) as watch:
                async for _ in watch:
                    if not await world.store.exists(vbd.backend):
                        break
            await server.close()
            assert await world.store.ls(above) == ([] if owner == STORAGE else [str(GUEST)])

    run(work())


def test_a_new_disk_of_the_same_name_keeps_its_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The toolstack was faster than the delay after which the old disk's nodes go."""
    monkeypatch.setattr(server_module, "CLEAR_DELAY_S", 0.0)

    async def work() -> None:
        async with disk_world(serve=False) as world:
            server = await storage_domain(world)
            await world.guest(GUEST)
            line = parse_xl_disk("vdev=xvda,access=rw,target=memory:8M")
            for _ in range(3):
                vbd = await attach(world.store, GUEST, line, backend_domid=STORAGE)
                async with await world.open(vbd) as disk:
                    assert await disk.read(0, 512) == bytes(512)
                await detach(world.store, vbd)
            await server.close()

    run(work())


def test_a_store_that_fails_once_costs_one_look(
    monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    """The device once followed nothing any more after that, and its disk could not be detached."""
    expect_log("nodes could not be read")

    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach()
            read, failures = world.store.try_read_each, [XenstoreError("EINVAL")]

            async def read_each(paths: Sequence[str]) -> list[str | XenstoreError | None]:
                if failures and any(path.endswith("/online") for path in paths):
                    return [failures.pop()] * len(paths)
                return await read(paths)

            async with await world.open(vbd) as disk:
                monkeypatch.setattr(world.store, "try_read_each", read_each)
                await world.store.write(f"backend/vbd/1/{vbd.vdev}/hotplug-status", "connected")
                await until(lambda: not failures)
                await disk.read(0, 512)
            await detach(world.store, vbd)

    run(work())


def test_xentop_reads_a_page_of_96_bytes(tmp_path: Path) -> None:
    page = XentopPage(3, 51712, directory=tmp_path)
    page.update(BackCounters(rd_req=5, rd_sect=40, wr_req=2, wr_sect=16, in_flight=1))
    data = (tmp_path / f"td3-{os.getpid()}/vbd-3-51712").read_bytes()
    assert len(data) == 96
    assert PAGE.unpack(data) == (1, 0, 1, 5, 5, 40, 0, 2, 2, 16, 0, 0, 0)
    page.close()
    assert os.listdir(tmp_path) == []


def test_a_killed_predecessors_page_is_removed(tmp_path: Path) -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world:
            left = tmp_path / "td3-4194304/vbd-1-51712"
            left.parent.mkdir()
            left.touch()
            path = "backend/vbd3/1/51712"
            await world.store.write(f"{path}/kthread-pid", "4194304")
            await world.store.write(f"{path}/state", "4")
            pages = XentopPages(world.store, tmp_path)
            await pages.add(path, BackCounters)
            assert await world.store.read(f"{path}/kthread-pid") == str(os.getpid())
            assert os.listdir(tmp_path) == [f"td3-{os.getpid()}"]
            pages.close()
            assert os.listdir(tmp_path) == []

    run(work())


def test_only_the_kind_that_xentop_looks_for_has_a_page(tmp_path: Path) -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world:
            pages = XentopPages(world.store, tmp_path)
            await pages.add("backend/vbd/1/51712", BackCounters)
            assert os.listdir(tmp_path) == []
            pages.close()

    run(work())
