# SPDX-License-Identifier: Apache-2.0
"""What an administrator may set: by name, for all disks or one, before and while they are used."""

import asyncio
import logging
import os
from collections.abc import Callable

import pytest
from rig_disk import World, disk_world, opener, run, until
from rig_guest import RawFrontend, backend_reaches
from rig_queue import rq

from xvd.backend.device import Device
from xvd.backend.server import Server
from xvd.backend.settings import Settings
from xvd.blkif.abi import Op
from xvd.blkif.messages import Segment
from xvd.dataplane.loop.waiting import sleep_cost_s
from xvd.errors import ConfigError
from xvd.frontend.settings import Settings as FrontendSettings

BLKBACKS = {
    "max_queues": 0, "max_buffer_pages": 1024, "max_persistent_grants": 1056,
    "persistent_grant_unused_seconds": 60, "max_ring_page_order": 4, "log_stats": 0,
    "feature_persistent": 1, "buffer_squeeze_duration_ms": 10,
}  # fmt: skip


def test_every_parameter_of_blkback_is_there_with_its_default() -> None:
    values = Settings().values()
    assert {name: values[name] for name in BLKBACKS} == BLKBACKS
    assert {n for n, row in Settings.table().items() if row.whose == "blkback"} == set(BLKBACKS)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [("max_queues=4", "max_queues", 4), (" max_queues = 4 ", "max_queues", 4),
     ("feature_persistent=N", "feature_persistent", 0), ("log_stats=yes", "log_stats", 1)],
)  # fmt: skip
def test_a_setting_is_written_as_a_module_parameter(text: str, name: str, value: int) -> None:
    assert Settings.of([text]).values()[name] == value


@pytest.mark.parametrize(
    "text",
    ["max_queues", "max_queues=", "max_queues=x", "max_queues=-1", "max_queues=1025", "queues=1",
     "max_queues=\u0661", "max_queues=Y", "copying=1", "max_ring_page_order=7", ""],
)  # fmt: skip
def test_what_cannot_be_set_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match=text.partition("=")[0] or "sets nothing"):
        Settings.of([text])


@pytest.mark.parametrize(("wanted", "offered"), [(0, 0), (11, 0), (12, 12), (4096, 4096)])
def test_few_indirect_segments_are_none(wanted: int, offered: int) -> None:
    assert Settings(max_indirect_segments=wanted).indirect_segments_offered == offered


def test_one_disk_may_have_its_own() -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world:
            overrides = {"1/51712": ["max_ring_page_order=0"]}
            world.server = Server(
                world.dom0, world.store, opener(), settings=Settings(max_ring_page_order=2),
                overrides=overrides,
            )  # fmt: skip
            await world.server.start()
            for vdev, order in (("xvda", "0"), ("xvdb", "2")):
                vbd = await world.attach(vdev=vdev)
                await backend_reaches(world, vbd, 2)
                assert await world.store.read(f"{vbd.backend}/max-ring-page-order") == order

    run(work())


async def four_grants_kept(world: World) -> tuple[RawFrontend, Device]:
    vbd = await world.attach()
    machine, store = await world.guest()
    frontend = RawFrontend(machine, store, vbd)
    await frontend.publish({"feature-persistent": "1"})
    await backend_reaches(world, vbd, 4)
    await frontend.ask(rq(Op.READ, 0, *map(Segment, frontend.pages.grefs)))
    assert world.server is not None
    device = world.server.device("1/51712")
    assert device.disk.counters().persistent_grants == 4
    return frontend, device


def test_what_is_live_holds_at_once() -> None:
    async def work() -> None:
        async with disk_world() as world:
            frontend, device = await four_grants_kept(world)
            assert world.server is not None
            values = world.server.change(["max_persistent_grants=1"])
            await until(lambda: device.disk.counters().persistent_grants == 1)
            assert values["max_persistent_grants"] == 1
            frontend.close()

    run(work())


@pytest.mark.slow
def test_grants_that_are_unused_for_as_long_as_is_set_now_are_let_go() -> None:
    async def work() -> None:
        async with disk_world() as world:
            frontend, device = await four_grants_kept(world)
            assert world.server is not None
            world.server.change(["persistent_grant_unused_seconds=1"])
            await until(lambda: device.disk.counters().persistent_grants == 0)
            frontend.close()

    run(work())


def test_figures_are_logged_from_when_that_is_set(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach()
            async with await world.open(vbd) as disk:
                await disk.read(0, 4096)
                assert world.server is not None
                device = world.server.device("1/51712")
                device.disk.log_figures()
                assert "rd_req" not in caplog.text
                world.server.change(["log_stats=Y"])
                device.disk.log_figures()
                assert "oo_req 0, rd_req 1, wr_req 0" in caplog.text

    caplog.set_level(logging.INFO)
    run(work())


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="nobody polls on a single CPU")
@pytest.mark.parametrize(("set_to", "most_ns"), [(None, None), (0, 0), (700, 700_000)])
def test_a_thread_polls_for_as_long_as_a_sleep_costs_unless_it_is_set(
    set_to: int | None, most_ns: int | None
) -> None:
    async def work() -> None:
        async with (
            disk_world(settings=Settings(poll_us=set_to, max_queues=1)) as world,
            await world.disk(),
        ):
            assert world.server is not None
            connection = world.server.device("1/51712").disk.connection
            assert connection is not None
            found = connection.loop_counters().poll_max_ns
            if most_ns is None:
                assert found >= int(sleep_cost_s() * 1e9) > 0
            else:
                assert found == most_ns

    run(work())


def test_what_is_negotiated_holds_from_the_next_connection_on() -> None:
    async def work() -> None:
        async with disk_world(settings=Settings(max_queues=4)) as world:
            vbd = await world.attach()
            async with await world.open(vbd):
                assert world.server is not None
                world.server.change(["max_queues=1"], "1/51712")
                assert await world.store.read(f"{vbd.backend}/multi-queue-max-queues") == "4"
            async with await world.open(vbd):
                assert await world.store.read(f"{vbd.backend}/multi-queue-max-queues") == "1"

    run(work())


def test_a_disks_own_setting_stays_when_that_of_all_changes() -> None:
    async def work() -> None:
        async with disk_world() as world:
            assert world.server is not None
            world.server.change(["max_queues=3"], "1/51712")
            world.server.change(["max_queues=5", "log_stats=1"])
            own = world.server.settings_of("backend/vbd/1/51712").values()
            others = world.server.settings_of("backend/vbd/1/51728").values()
            assert (own["max_queues"], own["log_stats"]) == (3, 1)
            assert (others["max_queues"], others["log_stats"]) == (5, 1)
            with pytest.raises(ConfigError):
                world.server.change(["max_queues=2", "log_stats=2"])
            assert world.server.settings_of("x").values()["max_queues"] == 5

    run(work())


def test_indirect_requests_are_as_large_as_linuxs() -> None:
    """Linux 402b27f9: 256 segments are offered, and a frontend uses 32 of them."""
    assert Settings().indirect_segments_offered == 256
    assert FrontendSettings().max_indirect_segments == 32


async def offered_order(world: World, vdev: str) -> str:
    vbd = await world.attach(vdev=vdev)
    await backend_reaches(world, vbd, 2)
    return await world.store.read(f"{vbd.backend}/max-ring-page-order")


def test_a_guest_may_be_named_by_its_name() -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world:
            world.server = Server(
                world.dom0, world.store, opener(),
                overrides={"guest1/51712": ["max_ring_page_order=1"],
                           "guest1/51728": ["max_ring_page_order=1"],
                           "1/51728": ["max_ring_page_order=2"]},
            )  # fmt: skip
            await world.server.start()

            assert await offered_order(world, "xvda") == "1"
            assert await offered_order(world, "xvdb") == "2"  # the number stands before the name
            assert world.server.guest_name("backend/vbd/1/51712") == "guest1"

    run(work())


def test_replaced_settings_hold_at_once_and_what_was_changed_before_is_forgotten() -> None:
    async def work() -> None:
        async with disk_world() as world:
            frontend, device = await four_grants_kept(world)
            assert world.server is not None
            world.server.change(["max_buffer_pages=7"])

            world.server.replace(
                ["max_persistent_grants=1"], {"1/51712": ["total_iops_sec=5"]},
                {"gold": ["total_iops_sec=9"]},
            )  # fmt: skip

            await until(lambda: device.disk.counters().persistent_grants == 1)
            assert device.disk.settings.total_iops_sec == 5
            assert device.disk.settings.max_buffer_pages == 1024
            assert world.server.change_group("", [])["gold"]["limits"] == {"total_iops_sec": 9}
            frontend.close()

    run(work())


@pytest.mark.parametrize(
    ("overrides", "groups"),
    [({"1/51712": ["max_queues=9999"]}, {}), ({}, {"gold": ["total_iops_sec_max=5"]})],
)
def test_settings_of_which_one_is_wrong_replace_none(
    overrides: dict[str, list[str]], groups: dict[str, list[str]]
) -> None:
    async def work() -> None:
        async with disk_world() as world:
            await world.attach()
            assert world.server is not None
            before = world.server.change([])

            with pytest.raises(ConfigError):
                world.server.replace(["max_buffer_pages=7"], overrides, groups)

            assert world.server.change([]) == before
            assert world.server.change_group("", []) == {}

    run(work())


def test_a_group_that_is_not_named_any_more_has_no_limits() -> None:
    async def work() -> None:
        async with disk_world() as world:
            await world.attach()
            assert world.server is not None
            world.server.change_group("gold", ["total_iops_sec=9"])

            world.server.replace([], {}, {})

            assert world.server.change_group("", []) == {}

    run(work())


# ---- What is set for one disk, and what for all ----


def test_what_no_longer_goes_with_a_disks_own_is_refused_and_changes_nothing() -> None:
    async def work() -> None:
        async with disk_world() as world:
            assert world.server is not None
            world.server.change(["total_iops_sec=5"])
            world.server.change(["total_iops_sec_max=10"], "9/51712")

            with pytest.raises(ConfigError, match=r"9/xvda: total_iops_sec_max is 10; a burst"):
                world.server.change(["total_iops_sec=20"])

            assert world.server.settings_of("backend/vbd/9/51712").total_iops_sec == 5

    run(work())


def test_a_disks_own_is_checked_before_there_is_the_disk() -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world:
            with pytest.raises(ConfigError, match=r"9/xvda: max_queues is 9999; it goes from"):
                Server(
                    world.dom0, world.store, opener(), overrides={"9/51712": ["max_queues=9999"]}
                )

    run(work())


def test_a_disk_whose_settings_contradict_each_other_is_left_and_no_other(
    expect_log: Callable[[str], None],
) -> None:
    expect_log("total_iops_sec_max is 10; a burst is more than total_iops_sec, 20; set it right")
    overrides = {
        "guest1/51712": ["total_iops_sec=20"],
        "1/51712": ["total_iops_sec_max=10"],
    }

    async def work() -> None:
        async with disk_world(serve=False) as world:
            world.server = Server(
                world.dom0, world.store, opener(), settings=Settings(total_iops_sec=5),
                overrides=overrides,
            )  # fmt: skip
            await world.server.start()
            waiting = asyncio.ensure_future(world.attach(vdev="xvda"))
            error = "error/backend/vbd/1/51712/error"
            while await world.store.try_read(error) is None:  # noqa: ASYNC110
                await asyncio.sleep(0)

            await backend_reaches(world, await world.attach(vdev="xvdb"), 2)

            assert "set it right, then attach" in str(await world.store.try_read(error))
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    run(work())
