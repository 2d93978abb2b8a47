# SPDX-License-Identifier: Apache-2.0
"""Limits of disks and of groups of disks, as an administrator sets them while guests run."""

import asyncio

import pytest
from rig_disk import World, disk_world, run

from xvd.backend.groups import Groups
from xvd.backend.iotune import SLACK_NS, IoTune
from xvd.backend.server import Server
from xvd.backend.settings import Settings
from xvd.blkif.operations import Kind
from xvd.dataplane.back.options import Bucket
from xvd.errors import ConfigError
from xvd.frontend.disk import Disk

LIBVIRTS = {
    f"{which}_{what}_sec{end}"
    for which in ("total", "read", "write")
    for what in ("bytes", "iops")
    for end in ("", "_max", "_max_length")
} | {"size_iops_sec", "group_name"}
SECOND_NS = 10**9


def server(world: World) -> Server:
    assert world.server is not None
    return world.server


async def waits(disk: Disk) -> "asyncio.Future[bytes]":
    """Read what the disk may not read yet."""
    reading = asyncio.ensure_future(disk.read(0, 4096))
    done, _ = await asyncio.wait([reading], timeout=0.05)
    assert not done
    return reading


def test_every_limit_of_libvirt_is_there_and_none_is_set() -> None:
    assert set(IoTune.table()) == LIBVIRTS
    assert IoTune().buckets == ()


def test_a_limit_is_a_bucket_and_its_burst_another() -> None:
    tune = IoTune.of(["read_iops_sec=100", "read_iops_sec_max=300", "write_bytes_sec=4096"])

    assert tune.buckets == (
        Bucket(100, (Kind.READ,), bytes=False, slack_ns=2 * SECOND_NS),
        Bucket(300, (Kind.READ,), bytes=False, slack_ns=SLACK_NS),
        Bucket(4096, (Kind.WRITE, Kind.FLUSH, Kind.DISCARD), bytes=True, slack_ns=SLACK_NS),
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("total_iops_sec_max=5", "total_iops_sec_max is a burst of nothing; set total_iops_sec"),
        ("total_iops_sec=5 total_iops_sec_max=5", "a burst is more than total_iops_sec, 5"),
        ("total_iops_sec=-1", "takes a whole number from 0"),
        ("read_bytes_sec_max_length=0", "it goes from 1 to 1000000"),
        ("group_name=a/b", "group_name is 'a/b'; it may have 64 letters"),
    ],
)
def test_what_is_no_limit_is_refused_by_name(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Settings.of(text.split())


@pytest.mark.parametrize("name", ["", "a b", "x" * 65])
def test_a_group_has_a_name(name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        Groups({name: ["total_iops_sec=1"]})


def test_a_disk_goes_by_its_limit_as_long_as_it_has_one() -> None:
    async def work() -> None:
        async with disk_world() as world, await world.disk() as disk:
            server(world).change(["total_iops_sec=1"], "1/51712")
            await disk.read(0, 4096)
            reading = await waits(disk)
            server(world).change(["total_iops_sec=0"], "1/51712")
            assert await reading == bytes(4096)
            assert server(world).device("1/51712").disk.counters().throttled >= 1

    run(work())


def test_a_disk_that_connects_anew_has_no_new_burst() -> None:
    async def work() -> None:
        async with disk_world(settings=Settings(total_iops_sec=1)) as world:
            vbd = await world.attach()
            async with await world.open(vbd) as disk:
                await disk.read(0, 4096)
            async with await world.open(vbd) as disk:
                reading = await waits(disk)
                server(world).change(["total_iops_sec=0"])
                await reading

    run(work())


def test_the_disks_of_a_group_share_its_limits() -> None:
    async def work() -> None:
        async with (
            disk_world(settings=Settings(group_name="gold")) as world,
            await world.open(await world.attach(vdev="xvda")) as one,
            await world.open(await world.attach(vdev="xvdb")) as two,
        ):
            server(world).change_group("gold", ["total_iops_sec=1"])
            await one.read(0, 4096)
            reading = await waits(two)
            told = server(world).change_group("gold", ["total_iops_sec=0", "read_iops_sec=10000"])
            await reading
            assert told == {
                "gold": {"limits": {"read_iops_sec": 10000}, "disks": ["1/xvda", "1/xvdb"]}
            }

    run(work())


def test_a_disk_leaves_its_group() -> None:
    async def work() -> None:
        async with disk_world(settings=Settings(group_name="gold")) as world:
            server(world).change_group("gold", ["total_iops_sec=1"])
            async with await world.disk() as disk:
                await disk.read(0, 4096)
                reading = await waits(disk)
                server(world).change(["group_name="], "1/51712")
                await reading
                assert server(world).change_group("", []) == {
                    "gold": {"limits": {"total_iops_sec": 1}, "disks": []}
                }

    run(work())


def test_limits_of_a_group_that_are_wrong_change_nothing() -> None:
    groups = Groups({"gold": ["total_iops_sec=100"]})

    with pytest.raises(ConfigError, match="a burst is more"):
        groups.change("gold", ["read_iops_sec=7", "total_iops_sec_max=50"])

    assert groups.limits() == {"gold": {"total_iops_sec": 100}}
