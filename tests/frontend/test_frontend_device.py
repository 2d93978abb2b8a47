# SPDX-License-Identifier: Apache-2.0
"""The frontend's device where its backend does not play along."""

import asyncio

import pytest
from rig_disk import disk_world, run, until
from rig_guest import RawBackend

from xvd.blkif.handshake import FrontendState
from xvd.errors import PeerClosed, XvdError
from xvd.frontend import device as device_module
from xvd.frontend.device import Device
from xvd.frontend.disk import Disk
from xvd.frontend.patience import Patience
from xvd.frontend.settings import Settings
from xvd.machine.emulated.limits import Limits
from xvd.machine.xs.client import Transaction
from xvd.toolstack.vbd import add
from xvd.toolstack.xldisk import parse_xl_disk
from xvd.types import Domid

DISK = "vdev=xvda,target=memory:1M"
PATH = "device/vbd/51712"


class Listener:
    """A device's user that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def connected(self, connection: object, features: object) -> None:
        self.told.append("connected")

    def resized(self, features: object) -> None:
        self.told.append("resized")

    def disconnected(self) -> None:
        self.told.append("disconnected")

    def ended(self, error: OSError | XvdError) -> None:
        self.told.append("ended")


@pytest.mark.parametrize("state", ["2", "4", "5"])
def test_a_device_is_closed_while_it_leads_a_dead_backend_round(state: str) -> None:
    """Its wish to close was lost in the reset, and then it waited for a backend for ever."""

    async def work() -> None:
        async with disk_world(serve=False) as world:
            machine, store = await world.guest()
            vbd = await add(world.store, Domid(1), parse_xl_disk(DISK), Domid(0))
            await store.write(f"{vbd.frontend}/state", "4")
            await world.store.write(f"{vbd.backend}/state", state)
            user = Listener()
            device = Device(machine, store, PATH, user)
            running = asyncio.ensure_future(device.run())
            resets = (FrontendState.RESET_CLOSING, FrontendState.RESET_CLOSED)
            await until(lambda: device.state in resets)
            device.close()
            async with asyncio.timeout(1):
                await running
            assert user.told == ["ended"]

    run(work())


def test_a_device_is_closed_while_it_waits_for_an_offer() -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world:
            machine, store = await world.guest()
            vbd = await add(world.store, Domid(1), parse_xl_disk(DISK), Domid(0))
            device = Device(machine, store, PATH, Listener())
            running = asyncio.ensure_future(device.run())
            await until(lambda: device.assignment is not None)
            device.close()
            await running
            assert await store.read(f"{vbd.frontend}/state") == "1"

    run(work())


def test_an_opening_that_is_cancelled_holds_nothing() -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world:
            machine, store = await world.guest()
            vbd = await add(world.store, Domid(1), parse_xl_disk(DISK), Domid(0))
            opening = asyncio.ensure_future(Disk.open(machine, store, PATH))
            await world.store.write(f"{vbd.backend}/state", "2")
            while await store.read(f"{vbd.frontend}/state") != "3":
                pass
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
            accounting = world.host.host.accounting()
            assert (accounting["pages"], accounting["ports"]) == (0, 0)

    run(work())


@pytest.mark.beyond_xen("limits")
def test_memory_that_runs_out_is_told_and_nothing_is_kept() -> None:
    async def work() -> None:
        async with disk_world(limits=Limits(pages=64, grefs=19, tracks=64, ports=8)) as world:
            vbd = await world.attach("memory:1M")
            with pytest.raises(XvdError, match="10 grant references left, 11 are needed; detach a"):
                await world.open(vbd, Settings(max_queues=1))
            assert (
                world.host.host.accounting()["pages"] == 1
            )  # the ring, which the backend has mapped

    run(work())


@pytest.mark.beyond_xen("limits")
def test_where_memory_is_short_there_are_fewer_pages_and_the_disk_works() -> None:
    async def work() -> None:
        async with disk_world(limits=Limits(pages=64, grefs=40, tracks=64, ports=8)) as world:
            async with await world.disk("memory:1M", front=Settings(max_queues=1)) as disk:
                data = bytes(range(256)) * 2048
                await disk.write(0, data)
                assert await disk.read(0, len(data)) == data
                assert world.host.host.accounting()["pages"] == 1 + 22

    run(work())


def test_a_disk_that_is_removed_while_it_is_opened() -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world:
            machine, store = await world.guest()
            vbd = await add(world.store, Domid(1), parse_xl_disk(DISK), Domid(0))
            opening = asyncio.ensure_future(Disk.open(machine, store, PATH))
            await asyncio.sleep(0)
            await world.store.rm(vbd.backend)
            with pytest.raises(PeerClosed, match="there is no backend; the disk was removed"):
                await opening

    run(work())


def test_a_disk_that_is_made_anew_between_two_polls_is_published_again() -> None:
    """Its frontend once waited for ever: the new backend offers, as the old one did before."""

    async def work() -> None:
        async with disk_world(serve=False) as world:
            machine, store = await world.guest()
            vbd = await add(world.store, Domid(1), parse_xl_disk(DISK), Domid(0))
            device = Device(machine, store, PATH, Listener())
            running = asyncio.ensure_future(device.run())
            await world.store.write(f"{vbd.backend}/state", "2")
            while await store.read(f"{vbd.frontend}/state") != "3":
                pass

            async def anew(tx: Transaction) -> None:
                await tx.rm(f"{vbd.frontend}/event-channel")
                await tx.write(f"{vbd.frontend}/state", "1")
                await tx.write(f"{vbd.backend}/state", "2")

            await world.store.transact(anew)

            while await store.try_read(f"{vbd.frontend}/event-channel") is None:
                pass
            assert await store.read(f"{vbd.frontend}/state") == "3"
            device.abandon()
            await running

    run(work())


def test_a_backend_that_closes_and_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one whose module was unloaded: nobody removes the disk, and nobody will serve it."""
    monkeypatch.setattr(device_module, "RETURN_S", 0.0)

    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach()
            disk = await world.open(vbd)
            assert world.server is not None
            await world.server.close()
            reading = asyncio.ensure_future(disk.read(0, 512))
            await world.store.write(f"{vbd.backend}/state", "6")
            with pytest.raises(OSError, match="not come back within"):
                await reading
            await disk.close()

    run(work())


@pytest.mark.slow
def test_a_backend_that_answers_nothing_is_given_up() -> None:
    """Its state stays at Connected: as one whose driver was taken away, it just does not answer."""

    async def work() -> None:
        async with disk_world(serve=False) as world:
            machine, store = await world.guest()
            vbd = await add(world.store, Domid(1), parse_xl_disk(DISK), Domid(0))
            backend = RawBackend(world, vbd)
            opening = asyncio.ensure_future(
                Disk.open(machine, store, PATH, settings=Settings(answer_timeout=0.4))
            )
            await backend.connect()
            disk = await opening
            with pytest.raises(OSError, match=r"has answered nothing for 0\.4 s"):
                await disk.read(0, 512)
            await disk.close()
            backend.close()

    run(work())


def test_a_backend_that_owes_nothing_may_be_silent() -> None:
    looks: list[tuple[int, int]] = [(0, 0), (5, 0), (5, 0), (5, 0), (5, 0), (5, 0), (5, 2)]
    gave_up: list[bool] = []

    async def work() -> None:
        def progress() -> tuple[int, int]:
            return looks.pop(0) if looks else (6, 1)

        patience = Patience(1e-6, progress, lambda: gave_up.append(True))
        patience.start()
        await until(lambda: not looks)
        assert gave_up == []
        await until(lambda: bool(gave_up))
        patience.stop()

    run(work())
