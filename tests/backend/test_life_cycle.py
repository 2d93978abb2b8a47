# SPDX-License-Identifier: Apache-2.0
"""Disks that go away, or lose their frontend, with requests in flight and otherwise."""

import asyncio
import gc
import os
from collections.abc import Callable, Iterator

import pytest
from rig_disk import World, disk_world, run, until
from rig_engines import ByHand, PythonEngine
from rig_guest import RawFrontend, backend_error, backend_reaches
from rig_queue import rq

from xvd.backend.device import StorageOpener
from xvd.blkif.abi import Op, Status
from xvd.blkif.assignment import BackendAssignment
from xvd.blkif.messages import Segment
from xvd.engines.interface import Engine, EngineInfo
from xvd.engines.uri import open_engine
from xvd.toolstack.vbd import Vbd, detach

CONNECTED, CLOSED = 4, 6


def by_hand(engines: list[ByHand]) -> StorageOpener:
    """Disks whose image is called slow are completed by the test; the others are in memory."""

    async def open_storage(assignment: BackendAssignment) -> Engine:
        if assignment.image != "slow":
            return open_engine("memory:1M")
        engines.append(ByHand(1 << 20))
        return engines[-1]

    return open_storage


async def waiting_at_the_storage(world: World, engines: list[ByHand]) -> tuple[RawFrontend, Vbd]:
    """A frontend with three requests that only the test can complete."""
    vbd = await world.attach("slow")
    machine, store = await world.guest()
    frontend = RawFrontend(machine, store, vbd)
    await frontend.publish({"feature-persistent": "1"})
    await backend_reaches(world, vbd, CONNECTED)
    segment = Segment(frontend.pages.grefs[0])
    frontend.queues[0].put(*(rq(Op.READ, 0, segment, id=i) for i in range(3)))
    assert world.server is not None
    device = world.server.device(f"1/{vbd.vdev}")
    await until(lambda: device.disk.counters().in_flight == 3)
    return frontend, vbd


@pytest.mark.beyond_xen("lasting")
def test_a_disconnect_waits_for_the_storage_and_gives_everything_back() -> None:
    """Linux 46464411: nothing may be unmapped under the storage, and nothing may stay."""
    engines: list[ByHand] = []

    async def work() -> None:
        async with disk_world(open_storage=by_hand(engines)) as world:
            frontend, vbd = await waiting_at_the_storage(world, engines)
            await frontend.store.write(f"{vbd.frontend}/state", "6")
            for _ in range(100):
                await asyncio.sleep(0)
            assert await world.store.read(f"{vbd.backend}/state") == "4"
            assert not frontend.pages.revoke(0)
            for operation in engines[0].channel.take():
                operation.complete()
            await backend_reaches(world, vbd, CLOSED)
            assert frontend.pages.revoke(0)
            assert frontend.ring_pages.revoke(0)
            frontend.close()

    run(work())


def test_a_slow_disk_that_closes_holds_nobody_up() -> None:
    """Linux 814d04e7."""
    engines: list[ByHand] = []

    async def work() -> None:
        async with disk_world(open_storage=by_hand(engines)) as world:
            frontend, vbd = await waiting_at_the_storage(world, engines)
            await frontend.store.write(f"{vbd.frontend}/state", "6")
            async with await world.disk(vdev="xvdb") as other:
                await other.write(0, b"not held up")
            for operation in engines[0].channel.take():
                operation.complete()
            await backend_reaches(world, vbd, CLOSED)
            frontend.close()

    run(work())


def test_a_disk_is_taken_away_while_it_works() -> None:
    engines: list[ByHand] = []

    async def work() -> None:
        async with disk_world(open_storage=by_hand(engines)) as world:
            frontend, vbd = await waiting_at_the_storage(world, engines)
            removal = asyncio.create_task(detach(world.store, vbd))
            await backend_reaches(world, vbd, 5)
            for operation in engines[0].channel.take():
                operation.complete()
            answers = await frontend.queues[0].answers(3)
            assert [answer.status for answer in answers] == [Status.OKAY] * 3
            await frontend.store.write(f"{vbd.frontend}/state", "6")
            await removal
            assert world.server is not None
            await until(lambda: not world.server.devices)
            assert not await world.store.exists(vbd.backend)
            frontend.close()

    run(work())


def test_a_disk_may_come_and_go_at_once_a_hundred_times() -> None:
    """XSA-350: a frontend that connects and disconnects as fast as it can (CVE-2020-29569)."""

    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach()
            machine, store = await world.guest()
            frontend = RawFrontend(machine, store, vbd)
            await frontend.publish(state="1")
            for _ in range(100):
                for state in ("4", "6", "1"):
                    await store.write(f"{vbd.frontend}/state", state)
            await frontend.publish(state="4")
            await backend_reaches(world, vbd, CONNECTED)
            answer = await frontend.ask(rq(Op.READ, 0, Segment(frontend.pages.grefs[0])))
            assert answer.status == Status.OKAY
            frontend.close()

    run(work())


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_what_a_disk_held_is_given_back_at_once_and_not_when_garbage_is_collected() -> None:
    async def work() -> None:
        async with disk_world() as world:
            held = []
            for _ in range(3):
                vbd = await world.attach()
                async with await world.open(vbd) as disk:
                    await disk.read(0, 4096)
                await detach(world.store, vbd)
                held.append(len(os.listdir("/proc/self/fd")))

            assert held == held[:1] * 3

    run(work())


def test_a_storm_of_nodes_is_no_more_to_do_than_one() -> None:
    """XSA-349: what waits for the device is bounded, whatever its frontend writes."""

    async def work() -> None:
        async with disk_world() as world:
            async with await world.disk(domid=2) as other:
                vbd = await world.attach()
                machine, store = await world.guest()
                frontend = RawFrontend(machine, store, vbd)
                await frontend.publish()
                await backend_reaches(world, vbd, CONNECTED)
                assert world.server is not None
                device = world.server.device(f"1/{vbd.vdev}")
                most = 0
                for number in range(2000):
                    await store.write(f"{vbd.frontend}/state", "4" if number % 2 else "3")
                    most = max(most, device.waiting)
                assert most <= 3
                await other.write(0, b"served meanwhile")
                answer = await frontend.ask(rq(Op.READ, 0, Segment(frontend.pages.grefs[0])))
                assert answer.status == Status.OKAY
                frontend.close()

    run(work())


class LargeBlocks(ByHand):
    """Memory of 4096-byte blocks."""

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(size=1 << 20, logical_block_size=4096, physical_block_size=4096)


async def large_blocks(assignment: BackendAssignment) -> Engine:
    return LargeBlocks(1 << 20)


def test_a_disk_of_large_blocks_counts_in_512_bytes() -> None:
    """blkif.h since 2024: sectors are of 512 bytes whatever sector-size says."""

    async def work() -> None:
        async with disk_world(open_storage=large_blocks) as world:
            vbd = await world.attach()
            machine, store = await world.guest()
            frontend = RawFrontend(machine, store, vbd)
            await frontend.publish()
            await backend_reaches(world, vbd, CONNECTED)
            names = ("sectors", "sector-size", "physical-sector-size")
            nodes = [await store.read(f"{vbd.backend}/{name}") for name in names]
            assert nodes == ["2048", "4096", "4096"]
            part = await frontend.ask(rq(Op.READ, 8, Segment(frontend.pages.grefs[0], 0, 0)))
            between = await frontend.ask(rq(Op.READ, 4, Segment(frontend.pages.grefs[0])))
            assert [part.status, between.status] == [Status.ERROR] * 2
            frontend.close()

    run(work())


def test_a_frontend_that_counts_in_large_blocks_is_not_served_wrong_ones(
    expect_log: Callable[[str], None],
) -> None:
    """Old Windows drivers mean sector-size where blkif means 512: each would spoil the other's."""
    expect_log("feature-large-sector-size")

    async def work() -> None:
        async with disk_world(open_storage=large_blocks) as world:
            vbd = await world.attach()
            machine, store = await world.guest()
            frontend = RawFrontend(machine, store, vbd)
            await frontend.publish({"feature-large-sector-size": "1"})
            await backend_reaches(world, vbd, CLOSED)
            assert "feature-large-sector-size" in await backend_error(world, vbd)
            frontend.close()

    run(work())


@pytest.mark.parametrize(("enable", "offered"), [("0", "0"), ("1", "1"), (None, "1")])
def test_the_toolstack_may_forbid_discard(enable: str | None, offered: str) -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world:
            adding = asyncio.create_task(world.attach())
            path = "/local/domain/0/backend/vbd/1/51712"
            watch = await world.store.watch(path)
            async for _ in watch:
                if await world.store.exists(f"{path}/params"):
                    break
            await watch.close()
            if enable is None:
                await world.store.rm(f"{path}/discard-enable")
            else:
                await world.store.write(f"{path}/discard-enable", enable)
            await world.serve(by_hand([]))
            vbd = await adding
            machine, store = await world.guest()
            frontend = RawFrontend(machine, store, vbd)
            await frontend.publish()
            await backend_reaches(world, vbd, CONNECTED)
            assert await store.read(f"{vbd.backend}/feature-discard") == offered
            answer = await frontend.ask(rq(Op.READ, 0, Segment(frontend.pages.grefs[0])))
            assert answer.status == Status.OKAY
            frontend.close()

    run(work())


def test_a_disk_whose_ring_is_full_takes_no_requests_from_another() -> None:
    """Linux bf0720c4: the memory for requests is a disk's own."""
    engines: list[ByHand] = []

    async def work() -> None:
        async with disk_world(open_storage=by_hand(engines)) as world:
            frontend, vbd = await waiting_at_the_storage(world, engines)
            segment = Segment(frontend.pages.grefs[0])
            frontend.queues[0].put(*(rq(Op.READ, 0, segment, id=i) for i in range(3, 32)))
            assert world.server is not None
            device = world.server.device(f"1/{vbd.vdev}")
            await until(lambda: device.disk.counters().in_flight == 32)
            async with await world.disk(vdev="xvdb") as other:
                await asyncio.gather(*(other.write(i * 8192, b"own") for i in range(64)))
                assert await other.read(63 * 8192, 3) == b"own"
            assert device.disk.counters().in_flight == 32
            for operation in engines[0].channel.take():
                operation.complete()
            assert len(await frontend.queues[0].answers(32)) == 32
            frontend.close()

    run(work())


def test_storage_is_opened_once_for_all_connections() -> None:
    """Linux 217759bb: what is opened is kept and handed on, not found again by its name."""
    engines: list[PythonEngine] = []

    async def open_storage(_: BackendAssignment) -> Engine:
        engines.append(PythonEngine(1 << 20))
        return engines[-1]

    async def work() -> None:
        async with disk_world(open_storage=open_storage) as world:
            vbd = await world.attach()
            for turn in range(3):
                async with await world.open(vbd) as disk:
                    await disk.write(turn * 512, b"x" * 512)
            await detach(world.store, vbd)

    run(work())
    assert [engine.closed for engine in engines] == [1]
