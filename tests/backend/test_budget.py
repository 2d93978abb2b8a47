# SPDX-License-Identifier: Apache-2.0
"""What a host has for its disks: counted, shared out, cut down, and refused by name."""

from dataclasses import replace
from pathlib import Path

import pytest
from rig_disk import World, disk_world, run
from rig_guest import RawFrontend, backend_error, backend_reaches

from xvd.backend.budget import (
    AGREED,
    NEGOTIABLE,
    QUEUE_MAPPINGS,
    RESOURCES,
    SHARE,
    Amounts,
    Budget,
    Claim,
)
from xvd.backend.limits import capacity, limits_of_host
from xvd.backend.settings import Settings
from xvd.errors import BudgetError, PeerClosed
from xvd.frontend.settings import Settings as FrontSettings

FULL = Claim(
    queues=4, ring_pages=16, segments=256, persistent=True, kept=1056, copying=False,
    buffer_pages=1024,
)  # fmt: skip
ONE_QUEUE = QUEUE_MAPPINGS + 1056


LEAST = {"queues": 1, "kept": 0, "copying": True, "persistent": False}


def only(name: str, amount: int) -> Budget:
    return Budget(replace(Amounts(), **{name: amount}))


# ---- Sharing out ----


def test_where_there_is_enough_nothing_is_changed() -> None:
    assert Budget().fit(FULL, NEGOTIABLE) == FULL


@pytest.mark.parametrize(
    ("mappings", "less"),
    [
        (SHARE * 2 * ONE_QUEUE, {"queues": 2}),
        (SHARE * ONE_QUEUE, {"queues": 1}),
        (SHARE * ONE_QUEUE - 1, {"queues": 1, "kept": 528}),
        (SHARE * (QUEUE_MAPPINGS + 33), {"queues": 1, "kept": 33}),
        (SHARE * (QUEUE_MAPPINGS + 32), LEAST),
        (QUEUE_MAPPINGS, LEAST),
    ],
)
def test_a_disk_has_fewer_queues_then_keeps_less_then_copies(
    mappings: int, less: dict[str, int]
) -> None:
    """Smaller rings would not help, so they stay as they are."""
    assert only("mappings", mappings).fit(FULL, NEGOTIABLE) == replace(FULL, **less)


def test_memory_is_saved_by_queues_then_rings_then_segments() -> None:
    one = replace(FULL, queues=1)
    small = replace(one, ring_pages=1)
    least = replace(small, segments=11)
    for wanted in (one, small, least):
        assert only("memory", SHARE * wanted.need.memory).fit(FULL, NEGOTIABLE) == wanted


def test_what_is_agreed_on_stays() -> None:
    claim = only("mappings", 4 * QUEUE_MAPPINGS).fit(FULL, AGREED)

    assert (claim.queues, claim.ring_pages, claim.copying) == (4, 16, True)


@pytest.mark.parametrize("name", RESOURCES)
def test_what_cannot_be_had_is_refused_by_name(name: str) -> None:
    with pytest.raises(BudgetError, match=rf"needs \d+ {name} at the least, and 1 are left; ") as e:
        only(name, 1).take(FULL, NEGOTIABLE)
    assert e.value.resource == name


def test_what_is_taken_is_given_back_once() -> None:
    limits = replace(Amounts(), mappings=10_000)
    budget = Budget(limits)

    lease = budget.take(FULL)
    assert budget.left.mappings == 10_000 - 4 * ONE_QUEUE
    lease.close()
    lease.close()

    assert budget.left == limits


def test_a_lease_grows_as_far_as_there_is_room_or_stays() -> None:
    budget = only("mappings", 6000)
    lease = budget.take(FULL)

    assert lease.change(replace(FULL, kept=264), AGREED).kept == 132
    left = budget.left
    with pytest.raises(BudgetError):
        lease.change(replace(FULL, queues=4000), ())

    assert lease.claim == replace(FULL, kept=132)
    assert budget.left == left


def test_what_a_host_has_is_read_from_the_kernel(tmp_path: Path) -> None:
    for name, text in {
        "sys/vm/max_map_count": "65530\n",
        "self/maps": "a\nb\n",
        "meminfo": "MemTotal: 9 kB\nMemAvailable: 2048 kB\n",
        "self/fd/0": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    limits = limits_of_host(maptrack=1000, proc=tmp_path)

    assert (limits.mappings, limits.grants, limits.memory) == (49145, 750, 1 << 20)
    assert capacity(FULL, limits)["mappings"] == 49145 // (4 * ONE_QUEUE) - SHARE + 1


# ---- Disks ----


async def check(world: World, number: int, front: FrontSettings | None = None) -> str:
    """A disk of guest `number`, whose data goes both ways; how the backend moves it."""
    async with await world.disk(domid=number, front=front) as disk:
        await disk.write(4096, bytes([number]) * 65536)
        assert await disk.read(4096, 65536) == bytes([number]) * 65536
        assert world.server is not None
        return world.server.device(f"{number}/51712").disk.mode


def test_a_disk_is_offered_what_there_is_room_for() -> None:
    async def work() -> None:
        limits = replace(Amounts(), mappings=SHARE * ONE_QUEUE)
        settings = Settings(max_queues=4)
        budget = Budget(limits)
        async with disk_world(settings=settings, budget=budget) as world:
            assert await check(world, 1, FrontSettings(max_queues=4)) == "persistent grants"
            assert await world.store.read("backend/vbd/1/51712/multi-queue-max-queues") == "1"
            assert budget.left == limits

    run(work())


@pytest.mark.slow
def test_what_is_left_to_later_disks_is_less_and_then_grant_copy() -> None:
    async def work() -> None:
        budget = only("mappings", SHARE * ONE_QUEUE)
        settings = Settings(max_queues=1)
        async with disk_world(settings=settings, budget=budget) as world:
            async with await world.disk(domid=1), await world.disk(domid=2):
                assert world.server is not None
                kept = world.server.device("2/51712").disk.connection
                assert kept is not None
                assert kept.plan.settings.max_persistent_grants == 528
                assert await check(world, 3) == "persistent grants"
                lease = budget.take(replace(FULL, kept=1700), ())
                assert await check(world, 4) == "grant copy"
                lease.close()

    run(work())


def test_a_disk_without_any_room_is_refused_with_the_reason_and_the_others_go_on(
    expect_log,
) -> None:
    expect_log("cannot connect to .*: this host has no room for the disk")

    async def work() -> None:
        budget = only("descriptors", 13)
        async with disk_world(settings=Settings(max_queues=1), budget=budget) as world:
            async with await world.disk(domid=1) as disk:
                vbd = await world.attach(domid=2)
                machine, store = await world.guest(2)
                frontend = RawFrontend(machine, store, vbd)
                await frontend.publish()
                await backend_reaches(world, vbd, 6)
                text = await backend_error(world, vbd)
                assert "needs 13 descriptors at the least, and 0 are left; raise" in text
                await disk.write(0, b"on")
                frontend.close()

    run(work())


def test_a_frontend_gives_up_a_backend_that_refuses_it_again_and_again(expect_log) -> None:
    expect_log("cannot connect to .*: this host has no room for the disk")

    async def work() -> None:
        budget = only("descriptors", 12)
        async with disk_world(settings=Settings(max_queues=1), budget=budget) as world:
            with pytest.raises(PeerClosed, match="has refused 5 connections in a row"):
                await world.disk()

    run(work())


@pytest.mark.slow
def test_twenty_disks_share_a_small_host() -> None:
    async def work() -> None:
        budget = only("mappings", 4 * ONE_QUEUE)
        async with disk_world(settings=Settings(max_queues=2), budget=budget) as world:
            disks = [await world.disk(domid=n, vdev=v) for n in (1, 2, 3, 4, 5)
                     for v in ("xvda", "xvdb", "xvdc", "xvdd")]  # fmt: skip
            for number, disk in enumerate(disks):
                await disk.write(0, bytes([number]) * 8192)
            for number, disk in enumerate(disks):
                assert await disk.read(0, 8192) == bytes([number]) * 8192
                await disk.close()
            assert budget.left.mappings == 4 * ONE_QUEUE

    run(work())


def test_a_setting_is_raised_as_far_as_there_is_room() -> None:
    async def work() -> None:
        budget = only("mappings", SHARE * 2 * ONE_QUEUE)
        async with (
            disk_world(settings=Settings(max_queues=1), budget=budget) as world,
            await world.disk(),
        ):
            assert world.server is not None
            world.server.change(["max_persistent_grants=4000"])
            connection = world.server.device("1/51712").disk.connection
            assert connection is not None
            assert connection.plan.lease.claim.kept == 2000

    run(work())
