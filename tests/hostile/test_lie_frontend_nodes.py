# SPDX-License-Identifier: Apache-2.0
"""Garbage in a frontend's directory: its device fails and says why; the next disk never notices."""

import asyncio
from collections.abc import Callable, Sequence

import pytest
from rig_disk import World, disk_world, run, until
from rig_guest import RawFrontend, backend_error, backend_reaches
from rig_queue import rq

from xvd.backend.device import Device
from xvd.backend.settings import Settings
from xvd.blkif.abi import Op
from xvd.blkif.handshake import BackendState
from xvd.blkif.messages import Segment
from xvd.errors import XenstoreError
from xvd.machine.xs.client import XenstoreClient
from xvd.machine.xs.messages import MessageType
from xvd.machine.xs.requests import Request

GARBAGE = ["", " ", "-1", "0x10", "1e3", "99999999999999999999", "4294967296", "x", "1 2", "\u0661"]
FAILED, CONNECTED = 6, 4
READS = (MessageType.READ, MessageType.DIRECTORY)
SMALLEST = Settings(max_ring_page_order=0, max_queues=1)


def lie(nodes: dict[str, str | bytes | None], text: str, expect_log) -> None:
    """Publish `nodes`; the device must fail with `text`, and serve an honest frontend after it."""
    expect_log(text)

    async def work() -> None:
        async with disk_world(settings=SMALLEST) as world:
            other = await world.disk(domid=2)
            vbd = await world.attach()
            machine, store = await world.guest(1)
            frontend = RawFrontend(machine, store, vbd)
            await frontend.publish(nodes)
            await backend_reaches(world, vbd, FAILED)
            assert text.replace("\\", "") in await backend_error(world, vbd)
            await other.write(0, b"unaffected")
            assert await other.read(0, 10) == b"unaffected"
            frontend.close()
            await frontend.write(dict.fromkeys(nodes) | {"state": "1"})
            await backend_reaches(world, vbd, 2)
            async with await world.open(vbd) as disk:
                await disk.write(0, b"served again")
            await other.close()

    run(work())


@pytest.mark.parametrize("value", [*GARBAGE[2:], "5000", "2000"])
def test_ring_ref(value: str, expect_log) -> None:
    lie({"ring-ref": value}, "cannot connect to /local/domain/1/device/vbd/51712", expect_log)


@pytest.mark.parametrize("value", [*GARBAGE[2:], "0", "63", "64", "4294967295"])
def test_event_channel(value: str, expect_log) -> None:
    lie({"event-channel": value}, "cannot connect to /local/domain/1/device/vbd/51712", expect_log)


@pytest.mark.parametrize("node", ["ring-ref", "event-channel"])
@pytest.mark.parametrize("value", [None, "", "\0"])
def test_a_node_that_is_missing(node: str, value: str | None, expect_log) -> None:
    lie({node: value}, f"frontend node {node} is missing", expect_log)


@pytest.mark.parametrize("value", [*GARBAGE[2:], "1", "5", "31", "32", "63", "64", "4294967295"])
def test_ring_page_order(value: str, expect_log) -> None:
    lie({"ring-page-order": value}, "frontend node ring-page-order holds", expect_log)


@pytest.mark.parametrize("value", ["0", "2", "1024", "1025", "4294967295", "-1", "many"])
def test_multi_queue_num_queues(value: str, expect_log) -> None:
    lie({"multi-queue-num-queues": value}, "frontend node multi-queue-num-queues hold", expect_log)


@pytest.mark.parametrize("value", ["x86_65-abi", "x86_64-abi2", "X86_64-ABI", "a" * 2000, "\u0661"])
def test_protocol(value: str, expect_log) -> None:
    lie({"protocol": value}, "frontend node protocol", expect_log)


@pytest.mark.parametrize("node", ["feature-persistent", "feature-large-sector-size"])
def test_features(node: str, expect_log) -> None:
    lie({node: "maybe"}, f"frontend node {node} holds 'maybe'", expect_log)


def test_bytes_that_are_no_text(expect_log) -> None:
    lie({"ring-ref": b"\xff\xfe8"}, "frontend node ring-ref holds", expect_log)


def test_a_ring_with_insane_indices(expect_log) -> None:
    expect_log("more requests on the ring than its 32 entries hold")

    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach()
            machine, store = await world.guest(1)
            frontend = RawFrontend(machine, store, vbd)
            frontend.ring_pages.view.cast("I")[0] = 1000
            await frontend.publish()
            await backend_reaches(world, vbd, FAILED)
            assert world.host.host.accounting()["mappings"] == 0
            frontend.close()

    run(work())


def test_a_ring_that_breaks_while_connected(expect_log) -> None:
    expect_log("the frontend broke the ring: indices out of bounds")

    async def work() -> None:
        async with disk_world() as world:
            other = await world.disk(domid=2)
            vbd = await world.attach()
            machine, store = await world.guest(1)
            frontend = RawFrontend(machine, store, vbd)
            await frontend.publish()
            await backend_reaches(world, vbd, CONNECTED)
            segment = Segment(frontend.pages.grefs[0])
            assert (await frontend.ask(rq(Op.READ, 0, segment))).status == 0
            frontend.ring_pages.view.cast("I")[0] = 5000
            frontend.port.notify()
            await backend_reaches(world, vbd, FAILED)
            assert "indices out of bounds" in await backend_error(world, vbd)
            assert frontend.ring_pages.revoke(0)
            await other.read(0, 4096)
            await other.close()
            frontend.close()

    run(work())


@pytest.mark.beyond_xen("third_domain")
def test_the_ring_of_somebody_else(expect_log) -> None:
    """A reference that another guest granted to the backend is none of this guest's."""
    expect_log("cannot connect to /local/domain/1")

    async def work() -> None:
        async with disk_world() as world:
            victim = await world.guest(2)
            pages = victim[0].grants.share(world.dom0.domid, 40)
            vbd = await world.attach()
            machine, store = await world.guest(1)
            frontend = RawFrontend(machine, store, vbd)
            await frontend.publish({"ring-ref": str(pages.grefs[39])})
            await backend_reaches(world, vbd, FAILED)
            frontend.close()
            pages.close()

    run(work())


@pytest.mark.parametrize("state", ["9", "-1", "99999", "x", b"\xff\xff", "4x", "", "7", "8"])
def test_a_state_that_is_none(state: str | bytes) -> None:
    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach()
            machine, store = await world.guest(1)
            frontend = RawFrontend(machine, store, vbd)
            await frontend.publish(state=state)
            await frontend.write({"state": "1"})
            # Not the node, which does not tell whether the backend is connecting just then.
            await until(lambda: the_device(world).state is BackendState.WAITING)
            async with await world.open(vbd) as disk:
                await disk.write(0, b"x")
            frontend.close()

    run(work())


def the_device(world: World) -> Device:
    assert world.server is not None
    [device] = world.server.devices.values()
    return device


def test_a_state_that_jumps_to_and_fro() -> None:
    """XSA-350: connecting and disconnecting faster than either can be done."""

    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach()
            machine, store = await world.guest(1)
            frontend = RawFrontend(machine, store, vbd)
            await frontend.publish(state="3")
            for turn in range(100):
                await frontend.write({"state": "63645136"[turn % 8]})
            await frontend.write({"state": "1"})
            # Not the node, which does not tell whether the backend is connecting just then.
            await until(lambda: the_device(world).state is BackendState.WAITING)
            frontend.close()
            async with await world.open(vbd) as disk:
                await disk.write(0, b"x")

    run(work())


def test_many_writers_of_the_state_at_once() -> None:
    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach()
            machine, store = await world.guest(1)
            frontend = RawFrontend(machine, store, vbd)
            await frontend.publish(state="3")
            await asyncio.gather(*(frontend.write({"state": "36"[i % 2]}) for i in range(100)))
            await frontend.write({"state": "6"})
            await frontend.write({"state": "1"})
            # Not the node, which does not tell whether the backend is connecting just then.
            await until(lambda: the_device(world).state is BackendState.WAITING)
            frontend.close()

    run(work())


@pytest.mark.parametrize("connected", [False, True])
def test_the_state_node_deleted(connected: bool) -> None:
    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach()
            machine, store = await world.guest(1)
            frontend = RawFrontend(machine, store, vbd)
            if connected:
                await frontend.publish()
                await backend_reaches(world, vbd, CONNECTED)
            await frontend.write({"state": None})
            if connected:
                await backend_reaches(world, vbd, 6)
                assert frontend.ring_pages.revoke(0)
            await frontend.write({"state": "1"})
            # Not the node, which does not tell whether the backend is connecting just then.
            await until(lambda: the_device(world).state is BackendState.WAITING)
            frontend.close()

    run(work())


def test_the_whole_directory_deleted_while_connected() -> None:
    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach()
            machine, store = await world.guest(1)
            frontend = RawFrontend(machine, store, vbd)
            await frontend.publish()
            await backend_reaches(world, vbd, CONNECTED)
            await world.store.rm(vbd.frontend)
            await backend_reaches(world, vbd, 6)
            assert frontend.ring_pages.revoke(0)
            frontend.close()

    run(work())


def test_a_directory_full_of_nodes() -> None:
    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach()
            machine, store = await world.guest(1)
            frontend = RawFrontend(machine, store, vbd)
            await frontend.write({f"queue-{i}": "x" * 100 for i in range(200)})
            await frontend.publish()
            await backend_reaches(world, vbd, CONNECTED)
            frontend.close()

    run(work())


def test_a_minimal_frontend_among_the_stale_keys_of_a_larger_one() -> None:
    """mini-os and OVMF write no order, no queues and go from 1 to 4 at once."""

    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach()
            machine, store = await world.guest(1)
            frontend = RawFrontend(machine, store, vbd)
            stale = {"ring-ref0": "7", "ring-ref1": "9", "num-ring-pages": "16", "queue-0": ""}
            await frontend.publish({**stale, "multi-queue-num-queues": "1"}, state="4")
            await backend_reaches(world, vbd, CONNECTED)
            response = await frontend.ask(rq(Op.READ, 0, Segment(frontend.pages.grefs[0])))
            assert response.status == 0
            await frontend.write({"state": "6"})
            await backend_reaches(world, vbd, 6)
            assert frontend.ring_pages.revoke(0)
            frontend.close()

    run(work())


def test_events_and_nodes_after_the_device_has_failed(expect_log) -> None:
    expect_log("cannot connect")

    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach()
            machine, store = await world.guest(1)
            frontend = RawFrontend(machine, store, vbd)
            await frontend.publish({"ring-ref": "-1"})
            await backend_reaches(world, vbd, FAILED)
            for turn in range(30):
                await frontend.write({"ring-ref": str(turn), "state": "34"[turn % 2]})
            frontend.port.notify()
            assert world.server is not None
            await until(lambda: bool(world.server and world.server.devices))
            assert await world.store.read(f"{vbd.backend}/state") == str(FAILED)
            frontend.close()

    run(work())
    assert len(expect_log.lines) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stray{}", "ring-ref{}", "queue-{}", "queue-0/ring-ref{}"])
def test_a_directory_filled_with_nodes_costs_no_more_than_an_honest_one(
    name: str, expect_log: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the quota lets a guest write: 3000 nodes are 48 KB of names."""
    asked: list[bytes] = []
    real = XenstoreClient.request_each

    async def counting(
        store: XenstoreClient, requests: Sequence[Request], tx_id: int = 0
    ) -> list[bytes | XenstoreError]:
        asked.extend(payload for kind, payload in requests if kind in READS)
        return await real(store, requests, tx_id)

    expect_log("holds more nodes than any driver writes")

    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach()
            machine, _ = await world.guest()
            for number in range(3000):
                await world.store.write(f"{vbd.frontend}/{name.format(number)}", "1")
            frontend = RawFrontend(machine, world.store, vbd)  # domain 0 has no quota
            monkeypatch.setattr(XenstoreClient, "request_each", counting)
            await frontend.publish({"multi-queue-num-queues": "1"})
            await backend_reaches(world, vbd, 5, 6)
            frontend.close()

    run(work())
    read = [path for path in asked if path.startswith(b"/local/domain/1/device/vbd/51712")]
    assert len(read) < 200
