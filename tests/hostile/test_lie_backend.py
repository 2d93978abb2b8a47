# SPDX-License-Identifier: Apache-2.0
"""A backend that lies to a disk: its user gets an error, not a hang, and the guest lives on."""

import asyncio
import errno

import pytest
from rig_disk import World, disk_world, run
from rig_guest import RawBackend

from xvd.blkif.messages import Response
from xvd.errors import XvdError
from xvd.frontend.disk import Disk
from xvd.frontend.settings import Settings
from xvd.toolstack.vbd import Vbd, add
from xvd.toolstack.xldisk import parse_xl_disk
from xvd.types import Domid, RequestId

READ, FLUSH = 0, 3


async def added(world: World) -> tuple[Vbd, RawBackend]:
    await world.guest(1)
    disk = parse_xl_disk("vdev=xvda,target=memory:1M")
    vbd = await add(world.store, Domid(1), disk, Domid(0))
    return vbd, RawBackend(world, vbd)


async def connected(world: World) -> tuple[Disk, RawBackend]:
    vbd, backend = await added(world)
    opening = asyncio.ensure_future(world.open(vbd))
    await backend.connect()
    return await opening, backend


@pytest.mark.parametrize(
    ("node", "value", "text"),
    [
        ("sectors", "-1", "backend node sectors holds '-1'"),
        ("sectors", "18446744073709551616", "backend node sectors holds"),
        ("sectors", "36028797018963968", "backend node sectors holds"),
        ("sectors", None, "backend node sectors is missing"),
        ("sectors", b"\xff", "backend node sectors holds"),
        ("sector-size", "3", "backend node sector-size holds '3'"),
        ("sector-size", "0", "backend node sector-size holds '0'"),
        ("sector-size", "513", "must be a power of two"),
        ("sector-size", "1048576", "backend node sector-size holds"),
        ("info", "x", "backend node info holds 'x'"),
        ("feature-flush-cache", "yes", "backend node feature-flush-cache holds 'yes'"),
        ("discard-granularity", "-4096", "backend node discard-granularity holds"),
        ("max-ring-page-order", "many", "backend node max-ring-page-order holds 'many'"),
    ],
)
def test_garbage_in_its_nodes(node: str, value: str | bytes | None, text: str) -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world:
            vbd, backend = await added(world)
            opening = asyncio.ensure_future(world.open(vbd))
            await backend.write({node: "1"})
            await backend.connect({node: value})
            with pytest.raises(XvdError, match=text):
                await opening
            backend.close()

    run(work())


@pytest.mark.parametrize(
    "node", ["max-ring-page-order", "max-ring-pages", "multi-queue-max-queues"]
)
def test_garbage_in_its_offer(node: str) -> None:
    """Read before anything is allocated by it."""

    async def work() -> None:
        async with disk_world(serve=False) as world:
            vbd, backend = await added(world)
            await backend.write({node: "-1", "state": "2"})
            with pytest.raises(XvdError, match=f"backend node {node} holds '-1'"):
                await world.open(vbd)
            assert world.host.host.accounting()["pages"] == 0

    run(work())


@pytest.mark.parametrize(("node", "pages"), [("max-ring-page-order", 1), ("max-ring-pages", 1)])
def test_an_offer_without_measure_is_cut_down_to_our_own(node: str, pages: int) -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world:
            vbd, backend = await added(world)
            await backend.write({node: "4294967295", "multi-queue-max-queues": "4294967295"})
            machine, store = await world.guest()
            path = f"device/vbd/{vbd.vdev}"
            opening = asyncio.ensure_future(
                Disk.open(machine, store, path, settings=Settings(max_queues=1))
            )
            await backend.connect()
            disk = await opening
            assert len(backend.mapping.view) == pages * 4096
            await disk._leave(abandon=True)
            backend.close()

    run(work())


def test_sectors_that_reach_the_end_of_64_bits() -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world:
            vbd, backend = await added(world)
            opening = asyncio.ensure_future(world.open(vbd))
            await backend.connect({"sectors": str(2**54)})
            disk = await opening
            assert disk.size == 2**63
            await disk._leave(abandon=True)
            backend.close()

    run(work())


@pytest.mark.parametrize(
    ("id", "operation", "text"),
    [
        (99, READ, "unknown_id"), (2**64 - 1, READ, "unknown_id"), (5, READ, "not_in_flight"),
        (0, FLUSH, "wrong_operation"),
    ],
)  # fmt: skip
def test_an_answer_that_was_not_asked_for(id: int, operation: int, text: str) -> None:
    """It fails what waits, although this backend never closes."""

    async def work() -> None:
        async with disk_world(serve=False) as world:
            disk, backend = await connected(world)
            reading = asyncio.ensure_future(disk.read(0, 4096))
            await backend.take()
            backend.ring.put_response(Response(RequestId(id), operation, 0))
            backend.push()
            with pytest.raises(OSError, match=text) as caught:
                await reading
            assert caught.value.errno == errno.ENODEV
            with pytest.raises(OSError, match=text):
                await disk.write(0, b"x")
            await disk.close()
            error = await world.store.read("/local/domain/1/error/device/vbd/51712/error")
            assert text in error
            backend.close()

    run(work())


def test_a_producer_too_far_ahead() -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world:
            disk, backend = await connected(world)
            backend.mapping.view.cast("I")[2] = 4000
            backend.port.notify()
            with pytest.raises(OSError, match="response_overflow"):
                await disk.read(0, 512)
            await disk.close()
            backend.close()

    run(work())


@pytest.mark.beyond_xen("lasting")
def test_a_grant_kept_mapped_is_not_reused_for_anybody() -> None:
    """XSA-396: the page stays out of use until the backend lets go."""

    async def work() -> None:
        async with disk_world(serve=False) as world:
            disk, backend = await connected(world)
            writing = asyncio.ensure_future(disk.write(0, b"s" * 4096))
            slot = await backend.take()
            gref = int.from_bytes(slot[24:28], "little")
            held = backend.grants.map([gref], writable=False)
            backend.ring.put_response(Response(RequestId(int.from_bytes(slot[8:16], "little")), 1))
            backend.push()
            with pytest.raises(OSError, match="grant_still_mapped"):
                await writing
            await disk.close()
            assert world.host.host.accounting()["pages"] > 0
            assert bytes(held.view[:4]) == b"ssss"
            held.close()
            backend.close()
            assert world.host.host.accounting()["pages"] == 0

    run(work())


@pytest.mark.parametrize("status", [-5, 1, 32767, -32768])
def test_a_status_that_nobody_knows_is_an_error(status: int) -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world:
            disk, backend = await connected(world)
            reading = asyncio.ensure_future(disk.read(0, 512))
            slot = await backend.take()
            id = RequestId(int.from_bytes(slot[8:16], "little"))
            backend.ring.put_response(Response(id, READ, status))
            backend.push()
            with pytest.raises(OSError, match="READ of 1 sectors at 0") as caught:
                await reading
            assert caught.value.errno == errno.EIO
            await disk._leave(abandon=True)
            backend.close()

    run(work())


@pytest.mark.parametrize("states", ["56", "6", "0", "999", "x", "3516", "5656"])
def test_a_state_that_jumps_away_ends_the_disk_or_finds_it_anew(states: str) -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world:
            disk, backend = await connected(world)
            await backend.write({"online": "0"})
            for state in states if states != "999" else [states]:
                await backend.write({"state": state})
            reading = asyncio.ensure_future(disk.read(0, 512))
            await backend.write({"state": "6"})
            with pytest.raises(OSError, match="the disk is gone") as caught:
                await reading
            assert caught.value.errno == errno.ENODEV
            await disk.close()
            backend.close()

    run(work())


def test_its_directory_deleted() -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world:
            disk, backend = await connected(world)
            reading = asyncio.ensure_future(disk.read(0, 512))
            await world.store.rm(backend.vbd.backend)
            with pytest.raises(OSError, match="the disk is gone"):
                await reading
            await disk.close()
            backend.close()

    run(work())


def test_a_storm_of_events() -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world:
            disk, backend = await connected(world)
            for _ in range(5000):
                backend.port.notify()
            reading = asyncio.ensure_future(disk.read(0, 512))
            slot = await backend.take()
            id = RequestId(int.from_bytes(slot[8:16], "little"))
            backend.ring.put_response(Response(id, READ))
            backend.push()
            assert await reading == bytes(512)
            await disk._leave(abandon=True)
            backend.close()

    run(work())


@pytest.mark.parametrize("states", ["4", "45", "4561"])
def test_xsa_349_a_storm_of_states_is_looked_at_once_for_many(states: str) -> None:
    """What is queued for the device does not grow with what the backend writes."""

    async def work() -> None:
        async with disk_world(serve=False) as world:
            disk, backend = await connected(world)
            longest = 0
            for turn in range(400):
                await backend.write({"state": states[turn % len(states)]})
                longest = max(longest, disk.device.waiting)
            assert longest <= 4
            await disk._leave(abandon=True)
            backend.close()

    run(work())
