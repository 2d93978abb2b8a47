# SPDX-License-Identifier: Apache-2.0
"""Attaching, listing and detaching, and what is told when it does not work."""

import pytest
from rig_disk import disk_world, run
from rig_guest import RawFrontend, backend_reaches

from xvd.errors import ConfigError, PeerClosed
from xvd.toolstack.vbd import Vbd, attach, destroy_guest, detach, list_disks
from xvd.toolstack.xldisk import parse_xl_disk
from xvd.types import Domid

DISK = "vdev=xvda,target=memory:1M"


def test_a_disk_is_attached_listed_and_detached() -> None:
    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach("memory:1M", vdev="xvdb", access="r")
            [row] = await list_disks(world.store)
            assert (row.vbd, row.target, row.mode) == (vbd, "memory:1M", "r")
            assert (row.frontend_state, row.backend_state) == ("1", "2")
            async with await world.open(vbd):
                [row] = await list_disks(world.store)
                assert (row.frontend_state, row.backend_state) == ("4", "4")
            await detach(world.store, vbd)
            assert await list_disks(world.store) == []
            for path in (vbd.frontend, vbd.backend, vbd.private):
                assert not await world.store.exists(path)

    run(work())


def test_nodes_are_readable_by_the_other_end_only() -> None:
    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach(domid=1)
            assert await world.store.get_perms(vbd.frontend) == ["n1", "r0"]
            assert await world.store.get_perms(vbd.backend) == ["n0", "r1"]

    run(work())


def test_the_same_vdev_twice() -> None:
    async def work() -> None:
        async with disk_world() as world:
            await world.attach()
            with pytest.raises(ConfigError, match="1/xvda exists already; detach it first"):
                await world.attach()
            assert len(await list_disks(world.store)) == 1

    run(work())


def test_a_guest_that_is_not_there() -> None:
    async def work() -> None:
        async with disk_world() as world:
            with pytest.raises(
                ConfigError, match="there is no guest 7 on this host; see: xvd list"
            ):
                await attach(world.store, Domid(7), parse_xl_disk(DISK))
            with pytest.raises(ConfigError, match="7/xvda: there is no such disk; see: xvd"):
                await detach(world.store, Vbd(Domid(7), 51712))

    run(work())


def test_no_backend_answers() -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world:
            await world.guest()
            with pytest.raises(
                PeerClosed, match=r"no backend has taken the disk within .*xvd back"
            ):
                await attach(world.store, Domid(1), parse_xl_disk(DISK), timeout_s=0.01)
            assert await list_disks(world.store) == []

    run(work())


def test_storage_that_cannot_be_opened_is_told_by_attach(expect_log) -> None:
    expect_log("cannot open '/no/such': .*no such image; make one")

    async def work() -> None:
        async with disk_world() as world:
            with pytest.raises(PeerClosed, match=r"cannot open '/no/such': .*make one"):
                await world.attach("/no/such")
            assert await list_disks(world.store) == []
            vbd = await world.attach("memory:1M")
            await detach(world.store, vbd)

    run(work())


def test_a_frontend_that_does_not_close() -> None:
    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach()
            machine, store = await world.guest()
            frontend = RawFrontend(machine, store, vbd)
            await frontend.publish()
            await backend_reaches(world, vbd, 4)
            with pytest.raises(PeerClosed, match="the frontend stays in state 4; unmount it there"):
                await detach(world.store, vbd, timeout_s=0.01)
            await detach(world.store, vbd, force=True, timeout_s=0.2)
            assert frontend.ring_pages.revoke(0)
            assert not await world.store.exists(vbd.backend)
            frontend.close()

    run(work())


def test_a_guest_that_dies_with_its_disk() -> None:
    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach()
            machine, store = await world.guest()
            frontend = RawFrontend(machine, store, vbd)
            await frontend.publish()
            await backend_reaches(world, vbd, 4)
            await store.close()
            await destroy_guest(world.store, vbd.domid)
            await backend_reaches(world, vbd, 6)
            assert frontend.ring_pages.revoke(0)
            machine.close()

    run(work())


def test_attach_and_detach_in_turns(tmp_path) -> None:
    """The image's lock is free as soon as the disk is gone."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))

    async def work() -> None:
        async with disk_world() as world:
            for turn in range(20):
                vbd = await world.attach(str(path))
                async with await world.open(vbd) as disk:
                    await disk.write(turn * 512, bytes([turn]) * 512)
                await detach(world.store, vbd)

    run(work())
    assert path.read_bytes()[: 20 * 512] == b"".join(bytes([i]) * 512 for i in range(20))


def test_a_garbled_assignment_is_reported_and_costs_itself_only(expect_log) -> None:
    expect_log("backend node frontend holds '/local/domain/2/device/vbd/51712'")

    async def work() -> None:
        async with disk_world() as world:
            other = await world.disk()
            base = "backend/vbd/9/51712"
            await world.store.write(f"{base}/frontend-id", "9")
            await world.store.write(f"{base}/frontend", "/local/domain/2/device/vbd/51712")
            while not await world.store.exists(f"error/{base}/error"):
                pass
            await other.read(0, 512)
            await other.close()

    run(work())
