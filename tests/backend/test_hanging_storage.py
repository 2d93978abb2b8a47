# SPDX-License-Identifier: Apache-2.0
"""Storage that never answers, as behind a dead server, costs its own disks only."""

import asyncio
import errno
import threading
from collections.abc import Callable, Iterator

import pytest
from rig_disk import World, disk_world, run, until
from rig_guest import backend_reaches

from xvd.backend import device as device_module
from xvd.backend import sizes as sizes_module
from xvd.backend.budget import Budget
from xvd.backend.device import StorageOpener
from xvd.backend.sizes import SizePoll
from xvd.blkif.assignment import BackendAssignment
from xvd.engines.interface import Engine
from xvd.engines.uri import open_engine
from xvd.errors import EngineError, PeerClosed
from xvd.toolstack.vbd import Vbd, attach, detach, wait_for_state
from xvd.toolstack.xldisk import parse_xl_disk
from xvd.types import Domid
from xvd.xenbus.runner import THREADS, in_own_thread

INIT_WAIT, INITIALISED = 2, 3


class Server:
    """What a dead file server is to its clients: nothing comes back until it lives again."""

    def __init__(self) -> None:
        self.lives = threading.Event()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(device_module, "STORAGE_PATIENCE_S", 0.01)
    monkeypatch.setattr(sizes_module, "PATIENCE_S", 0.01)
    one = Server()
    yield one
    one.lives.set()


def opener_of(server: Server) -> StorageOpener:
    """Opens storage in memory, and whatever lies below /dead when the server answers."""

    def open_somehow(assignment: BackendAssignment) -> Engine:
        if assignment.image.startswith("/dead"):
            server.lives.wait()
        if assignment.image.endswith("none"):
            raise EngineError(errno.ENOENT, "no such image")
        return open_engine("memory:1M")

    async def open_storage(assignment: BackendAssignment) -> Engine:
        return await in_own_thread(open_somehow, assignment)

    return open_storage


async def add(world: World, vdev: str, target: str, timeout_s: float = 25) -> None:
    disk = parse_xl_disk(f"vdev={vdev},target={target}")
    await attach(world.store, Domid(1), disk, timeout_s=timeout_s)


def test_disks_are_attached_beside_any_number_that_hang(server: Server) -> None:
    hanging = 20

    async def work() -> None:
        async with disk_world(open_storage=opener_of(server)) as world:
            await world.guest()
            names = [f"xvd{chr(98 + number)}" for number in range(hanging)]
            waiting = [asyncio.ensure_future(add(world, name, f"/dead/{name}")) for name in names]
            assert world.server is not None
            served = world.server
            await until(lambda: len(served.devices) == hanging)
            await add(world, "xvda", "memory:1M")
            assert not any(task.done() for task in waiting)
            server.lives.set()
            await asyncio.gather(*waiting)

    run(work())


def test_a_disk_whose_storage_hangs_can_be_taken_away(
    server: Server, expect_log: Callable[[str], None]
) -> None:
    expect_log("its storage does not answer")

    async def work() -> None:
        async with disk_world(open_storage=opener_of(server)) as world:
            await world.guest()
            with pytest.raises(PeerClosed, match="no backend has taken the disk"):
                await add(world, "xvdb", "/dead/one", timeout_s=0.1)
            assert world.server is not None
            served = world.server
            await until(lambda: not served.devices)

    run(work())


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "OFFER_S", 0.01)


async def announced(world: World, target: str) -> "tuple[asyncio.Task[Vbd], Vbd]":
    """The attach that waits for the storage of a disk, and the disk, which is offered meanwhile."""
    await world.guest()
    attaching = asyncio.ensure_future(world.attach(target))
    vbd = Vbd(Domid(1), 51712)
    await backend_reaches(world, vbd, INIT_WAIT)
    assert await world.store.read(f"{vbd.backend}/opening") == "1"
    assert await world.store.try_read(f"{vbd.backend}/sectors") is None
    return attaching, vbd


def test_a_disk_is_offered_while_its_storage_is_still_being_opened(
    server: Server, impatient: None
) -> None:
    async def work() -> None:
        async with disk_world(open_storage=opener_of(server)) as world:
            attaching, vbd = await announced(world, "/dead/one")
            opening = asyncio.ensure_future(world.open(vbd))
            _, store = await world.guest()
            await wait_for_state(store, vbd.frontend, lambda state: state == INITIALISED, 10)
            assert not attaching.done()
            server.lives.set()
            assert await attaching == vbd
            async with await opening as disk:
                await disk.write(0, b"late")
                assert bytes(await disk.read(0, 512))[:4] == b"late"
            assert not await world.store.exists(f"{vbd.backend}/opening")

    run(work())


def test_what_was_offered_before_the_storage_was_open_holds(
    server: Server, impatient: None
) -> None:
    """Others may have taken what there was room for meanwhile."""
    budget = Budget()
    early = ["max-ring-page-order", "multi-queue-max-queues", "feature-max-indirect-segments"]

    async def work() -> None:
        async with disk_world(open_storage=opener_of(server), budget=budget) as world:
            attaching, vbd = await announced(world, "/dead/one")
            offered = [await world.store.read(f"{vbd.backend}/{name}") for name in early]
            budget.fit = NotImplemented  # type: ignore[method-assign]  # it is not asked again
            server.lives.set()
            await attaching
            assert [await world.store.read(f"{vbd.backend}/{name}") for name in early] == offered

    run(work())


def test_an_attach_hears_why_storage_could_not_be_opened_after_all(
    server: Server, impatient: None, expect_log: Callable[[str], None]
) -> None:
    expect_log("cannot open '/dead/none'")

    async def work() -> None:
        async with disk_world(open_storage=opener_of(server)) as world:
            attaching, vbd = await announced(world, "/dead/none")
            server.lives.set()
            with pytest.raises(PeerClosed, match="cannot open '/dead/none': no such image"):
                await attaching
            assert not await world.store.exists(vbd.backend)

    run(work())


def test_a_disk_is_taken_away_while_its_storage_is_being_opened(
    server: Server, impatient: None, expect_log: Callable[[str], None]
) -> None:
    expect_log("its storage does not answer")

    async def work() -> None:
        async with disk_world(open_storage=opener_of(server)) as world:
            attaching, vbd = await announced(world, "/dead/one")
            await detach(world.store, vbd)
            with pytest.raises(PeerClosed):
                await attaching
            assert world.server is not None
            served = world.server
            await until(lambda: not served.devices)

    run(work())


class Disk:
    """One that may be asked for its size."""

    def __init__(self, server: Server, *, hangs: bool = False) -> None:
        self.server = server
        self.hangs = hangs
        self.asked = 0

    def has_another_size(self) -> bool:
        self.asked += 1
        if self.hangs:
            self.server.lives.wait()
        return True


def test_a_look_at_sizes_goes_past_one_that_hangs_until_it_answers(server: Server) -> None:
    first, dead, last = disks = Disk(server), Disk(server, hangs=True), Disk(server)

    async def work() -> None:
        sizes: SizePoll[Disk] = SizePoll(THREADS)
        assert await sizes.poll(disks) == [first, last]
        assert await sizes.poll(disks) == [first, last]
        assert [disk.asked for disk in disks] == [2, 1, 2]
        server.lives.set()
        await until(lambda: not sizes.hanging)
        assert await sizes.poll(disks) == [first, dead, last]

    run(work())


def test_what_a_call_in_its_own_thread_raises_is_raised_here() -> None:
    def fails() -> None:
        raise ZeroDivisionError("there")

    with pytest.raises(ZeroDivisionError, match="there"):
        run(in_own_thread(fails))
