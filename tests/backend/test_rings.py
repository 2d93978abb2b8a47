# SPDX-License-Identifier: Apache-2.0
"""Rings of several pages and disks of several queues, from a frontend that writes its own nodes."""

from collections.abc import Callable
from pathlib import Path

import pytest
from rig_disk import World, disk_world, opener, run, until
from rig_guest import RawFrontend, backend_error, backend_reaches, connected
from rig_queue import NOTHING, rq

from xvd.backend import device as device_module
from xvd.backend.device import Device
from xvd.backend.settings import Settings
from xvd.blkif.abi import Op, Status
from xvd.blkif.messages import Segment

CONNECTED, FAILED = 4, 6
WIDE = Settings(max_ring_page_order=6, max_queues=8)


def the_device(world: World) -> Device:
    assert world.server is not None
    [device] = world.server.devices.values()
    return device


@pytest.mark.parametrize("order", range(7))
def test_a_ring_of_any_size_is_served_full_and_over_its_end(order: int) -> None:
    async def work() -> None:
        async with disk_world(settings=WIDE) as world:
            frontend, _ = await connected(world, order=order)
            entries = 32 << order
            assert frontend.ring.nr_ents == entries
            segment = Segment(frontend.pages.grefs[0])
            for count in (entries, 3):
                requests = [rq(Op.READ, 0, segment, id=i) for i in range(count)]
                frontend.queues[0].put(*requests)
                answers = await frontend.queues[0].answers(count)
                assert sorted(answer.id for answer in answers) == list(range(count))
                assert {answer.status for answer in answers} == {Status.OKAY}
            frontend.close()

    run(work())


def test_what_is_offered_is_what_was_set() -> None:
    async def work() -> None:
        async with disk_world(settings=WIDE) as world:
            vbd = await world.attach()
            await backend_reaches(world, vbd, 2)
            names = ("max-ring-page-order", "multi-queue-max-queues")
            assert [await world.store.read(f"{vbd.backend}/{n}") for n in names] == ["6", "8"]

    run(work())


@pytest.mark.parametrize("order", [0, 2])
def test_every_queue_serves_and_counts_for_itself(order: int) -> None:
    async def work() -> None:
        async with disk_world(settings=WIDE) as world:
            frontend, _ = await connected(world, queues=4, order=order)
            segment = Segment(frontend.pages.grefs[0])
            for number, queue in enumerate(frontend.queues):
                for i in range(number + 1):
                    answer = await queue.ask(rq(Op.READ, 0, segment, id=i))
                    assert (answer.id, answer.status) == (i, Status.OKAY)
            device = the_device(world)
            assert device.disk.connection is not None
            counted = [link.queue.counters()["rd_req"] for link in device.disk.connection.links]
            assert counted == [1, 2, 3, 4]
            assert device.disk.counters().rd_req == 10
            frontend.close()

    run(work())


def test_what_one_queue_writes_another_reads() -> None:
    async def work() -> None:
        async with disk_world(settings=WIDE) as world:
            frontend, _ = await connected(world, queues=2)
            first, second = frontend.queues
            frontend.pages.view[:4096] = b"q" * 4096
            await first.ask(rq(Op.WRITE, 8, Segment(frontend.pages.grefs[0])))
            await second.ask(rq(Op.READ, 8, Segment(frontend.pages.grefs[1])))
            assert bytes(frontend.pages.view[4096:8192]) == b"q" * 4096
            frontend.close()

    run(work())


@pytest.mark.parametrize("broken", [0, 1, 3])
def test_a_queue_that_breaks_ends_its_disk_and_no_other(
    broken: int, expect_log: Callable[[str], None]
) -> None:
    expect_log("the frontend broke the ring: indices out of bounds")

    async def work() -> None:
        async with disk_world(settings=WIDE) as world:
            other = await world.disk(domid=2)
            frontend, vbd = await connected(world, queues=4)
            queue = frontend.queues[broken]
            queue.ring_pages.view.cast("I")[0] = 5000
            queue.port.notify()
            await backend_reaches(world, vbd, FAILED)
            assert "indices out of bounds" in await backend_error(world, vbd)
            assert all(queue.ring_pages.revoke(0) for queue in frontend.queues)
            await other.read(0, 4096)
            await other.close()
            frontend.close()

    run(work())


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_one_queue_that_cannot_be_connected_leaves_nothing_of_the_others(
    bad: int, expect_log: Callable[[str], None]
) -> None:
    expect_log("cannot connect to")

    async def work() -> None:
        async with disk_world(settings=WIDE) as world:
            vbd = await world.attach()
            machine, store = await world.guest()
            frontend = RawFrontend(machine, store, vbd, queues=4)
            await frontend.publish({f"queue-{bad}/ring-ref": "1999"})
            await backend_reaches(world, vbd, FAILED)
            assert world.host.host.accounting()["mappings"] == NOTHING["mappings"]
            frontend.close()

    run(work())


def test_a_queue_that_is_not_published_is_named(expect_log: Callable[[str], None]) -> None:
    expect_log("queue-2/event-channel is missing")

    async def work() -> None:
        async with disk_world(settings=WIDE) as world:
            vbd = await world.attach()
            machine, store = await world.guest()
            frontend = RawFrontend(machine, store, vbd, queues=3)
            await frontend.publish({"queue-2/event-channel": None})
            await backend_reaches(world, vbd, FAILED)
            frontend.close()

    run(work())


def test_a_mistake_of_ours_costs_its_disk_and_is_told(
    expect_log: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(*_: object) -> None:
        raise ZeroDivisionError("of ours")

    expect_log("cannot connect to .*: of ours")
    monkeypatch.setattr(device_module, "Connection", mistaken)

    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach()
            machine, store = await world.guest()
            frontend = RawFrontend(machine, store, vbd)
            await frontend.publish()
            await backend_reaches(world, vbd, FAILED)
            assert "of ours" in await backend_error(world, vbd)
            frontend.close()

    run(work())


def test_a_frontend_comes_back_with_fewer_queues_and_smaller_rings() -> None:
    """Linux with all it has, then firmware that knows one page: nothing may be remembered."""

    async def work() -> None:
        async with disk_world(settings=WIDE) as world:
            frontend, vbd = await connected(world, queues=4, order=2)
            machine, store = await world.guest()
            frontend.close()
            await store.write(f"{vbd.frontend}/state", "6")
            await backend_reaches(world, vbd, 6)
            for name in ("multi-queue-num-queues", "ring-page-order", "protocol"):
                await store.rm(f"{vbd.frontend}/{name}")
            await store.write(f"{vbd.frontend}/state", "1")
            await backend_reaches(world, vbd, 2)
            second = RawFrontend(machine, store, vbd)
            await second.publish()
            await backend_reaches(world, vbd, CONNECTED)
            answer = await second.ask(rq(Op.READ, 0, Segment(second.pages.grefs[0])))
            assert answer.status == Status.OKAY
            second.close()

    run(work())


def journals(world: World) -> list[str]:
    return sorted(path.name for path in Path(world.journals.name).rglob("*.ring"))


def test_a_successor_takes_up_every_queue_from_its_own_journal() -> None:
    async def work() -> None:
        async with disk_world(settings=WIDE) as world:
            frontend, _ = await connected(world, "null:8M", queues=3, order=1)
            assert world.server is not None
            assert len(journals(world)) == 3
            await world.server.close()
            segment = Segment(frontend.pages.grefs[0])
            for number, queue in enumerate(frontend.queues):
                queue.put(*(rq(Op.READ, 0, segment, id=i) for i in range(number + 1)))
            await world.serve(opener(), Settings(max_queues=1, max_ring_page_order=0))
            for number, queue in enumerate(frontend.queues):
                answers = await queue.answers(number + 1)
                assert [answer.id for answer in answers] == list(range(number + 1))
            frontend.close()

    run(work())


def test_journals_end_with_their_connection() -> None:
    async def work() -> None:
        async with disk_world(settings=WIDE) as world:
            frontend, vbd = await connected(world, queues=3)
            assert len(journals(world)) == 3
            _, store = await world.guest()
            await store.write(f"{vbd.frontend}/state", "6")
            await backend_reaches(world, vbd, 6)
            await until(lambda: journals(world) == [])
            frontend.close()

    run(work())


def test_every_queue_keeps_grants_of_its_own() -> None:
    """Linux d4bf0065: one queue's limit and one queue's grants are nobody else's."""

    async def work() -> None:
        settings = Settings(max_queues=2, max_persistent_grants=3)
        async with disk_world(settings=settings) as world:
            vbd = await world.attach()
            machine, store = await world.guest()
            frontend = RawFrontend(machine, store, vbd, queues=2)
            await frontend.publish({"feature-persistent": "1"})
            await backend_reaches(world, vbd, CONNECTED)
            segments = [Segment(gref) for gref in frontend.pages.grefs]
            await frontend.queues[0].ask(rq(Op.READ, 0, *segments))
            await frontend.queues[1].ask(rq(Op.READ, 0, *segments[:2]))
            connection = the_device(world).disk.connection
            assert connection is not None
            kept = [link.queue.counters()["persistent_grants"] for link in connection.links]
            assert kept == [3, 2]
            frontend.close()

    run(work())


def test_a_broken_ring_is_told_once_and_served_again_after_a_reconnect(expect_log) -> None:
    """Linux 8e3f8755."""
    expect_log("the frontend broke the ring: indices out of bounds")

    async def work() -> None:
        async with disk_world() as world:
            frontend, vbd = await connected(world)
            for _ in range(3):
                frontend.ring_pages.view.cast("I")[0] = 5000
                frontend.port.notify()
                await backend_reaches(world, vbd, FAILED)
            frontend.close()
            await frontend.write({"state": "6"})
            await frontend.write({"state": "1"})
            await backend_reaches(world, vbd, 2)
            second = RawFrontend(frontend.machine, frontend.store, vbd)
            await second.publish()
            await backend_reaches(world, vbd, CONNECTED)
            answer = await second.ask(rq(Op.READ, 0, Segment(second.pages.grefs[0])))
            assert answer.status == Status.OKAY
            second.close()

    run(work())
    assert len(expect_log.lines) == 1
