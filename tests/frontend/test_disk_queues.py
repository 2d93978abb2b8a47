# SPDX-License-Identifier: Apache-2.0
"""Several queues, large rings, persistent grants, indirect requests: a disk on a rich backend."""

import asyncio
import random
from dataclasses import replace

import pytest
from rig_backend import RICH, ModelBackend, model_disk
from rig_disk import disk_world, run, until

from xvd.blkif.messages import IndirectRequest
from xvd.errors import ConfigError, XenstoreError
from xvd.frontend.load import Job, run_load
from xvd.frontend.settings import Settings
from xvd.machine.emulated.limits import Limits
from xvd.toolstack.vbd import add, wait_for_state
from xvd.toolstack.xldisk import parse_xl_disk
from xvd.types import Domid

LARGE = Limits(pages=32768, grefs=16384, tracks=16384, ports=64)


@pytest.mark.parametrize("queues", [1, 2, 4])
@pytest.mark.parametrize("order", [0, 1, 4, 6])
def test_every_shape_of_rings_carries_data(queues: int, order: int) -> None:
    async def work() -> None:
        async with disk_world(serve=False, limits=LARGE) as world:
            async with model_disk(world, max_queues=queues, max_ring_page_order=order) as (
                disk,
                backend,
            ):
                data = random.Random(order).randbytes(1 << 20)
                parts = [*range(0, len(data), 8192), *range(4096, len(data), 8192)]
                await asyncio.gather(*(disk.write(at, data[at : at + 4096]) for at in parts))
                assert await disk.read(0, len(data)) == data
                assert backend.storage[: len(data)] == data
                assert backend.config is not None
                assert (len(backend.config.queues), backend.config.ring_pages) == (
                    queues,
                    1 << order,
                )

    run(work())


@pytest.mark.parametrize("order", [0, 2, 6])
@pytest.mark.parametrize("queues", [1, 3])
def test_what_is_published_is_what_is_used_and_nothing_else(queues: int, order: int) -> None:
    async def work() -> None:
        async with disk_world(serve=False, limits=LARGE) as world:
            _, store = await world.guest()
            path = "/local/domain/1/device/vbd/51712"
            async with model_disk(world, max_queues=queues, max_ring_page_order=order):
                names = set(await store.ls(path))
            top = {"protocol", "feature-persistent"}
            rings = {"event-channel"}
            rings |= {f"ring-ref{page}" for page in range(1 << order)} if order else {"ring-ref"}
            top |= {"ring-page-order"} if order else set()
            if queues == 1:
                top |= rings
            else:
                top |= {"multi-queue-num-queues", *(f"queue-{n}" for n in range(queues))}
                assert set(await store.ls(f"{path}/queue-0")) == rings
            theirs = {"backend", "backend-id", "state", "virtual-device", "device-type", "trusted"}
            assert names - theirs == top

    run(work())


def test_the_backend_has_the_last_word() -> None:
    async def work() -> None:
        async with disk_world(serve=False, limits=LARGE) as world:
            features = replace(RICH, max_queues=2, max_ring_page_order=1, max_indirect_segments=20)
            async with model_disk(
                world, features, max_queues=8, max_ring_page_order=6, max_indirect_segments=4096
            ) as (disk, backend):
                await disk.write(0, bytes(20 * 4096 + 512))
                assert backend.config is not None
                assert (len(backend.config.queues), backend.config.ring_pages) == (2, 2)
                assert [type(r).__name__ for r in backend.seen] == ["IndirectRequest", "Request"]

    run(work())


@pytest.mark.parametrize(
    ("offered", "wanted", "used"), [(256, 32, 32), (20, 32, 20), (256, 100, 100), (256, 11, 0)]
)
def test_indirect_requests_are_as_large_as_both_allow(offered: int, wanted: int, used: int) -> None:
    async def work() -> None:
        async with disk_world(serve=False, limits=LARGE) as world:
            features = replace(RICH, max_indirect_segments=offered)
            async with model_disk(world, features, max_indirect_segments=wanted) as (disk, backend):
                await disk.write(0, bytes(1 << 20))
                sizes = {r.nr_segments for r in backend.seen if isinstance(r, IndirectRequest)}
                assert max(sizes, default=0) == used

    run(work())


def test_operations_go_round_the_queues() -> None:
    async def work() -> None:
        async with disk_world(serve=False, limits=LARGE) as world:
            async with model_disk(world, max_queues=4) as (disk, backend):
                await asyncio.gather(*(disk.write(i * 8192, bytes(512)) for i in range(40)))
                assert [len(ring.taken) for ring in backend.rings] == [10, 10, 10, 10]

    run(work())


def test_a_sequence_stays_on_its_queue_and_is_joined() -> None:
    async def work() -> None:
        async with disk_world(serve=False, limits=LARGE) as world:
            async with model_disk(world, max_queues=4) as (disk, backend):
                await asyncio.gather(*(disk.write(i * 4096, bytes([i]) * 4096) for i in range(32)))
                assert sum(bool(ring.taken) for ring in backend.rings) == 1
                assert disk.counters().merged == 32 - len(backend.seen)
                expected = b"".join(bytes([i]) * 4096 for i in range(32))
                assert await disk.read(0, 32 * 4096) == expected

    run(work())


@pytest.mark.beyond_xen("lasting")
def test_persistent_grants_need_both() -> None:
    async def counters(persistent: bool, feature_persistent: bool) -> tuple[int, int]:
        async with disk_world(serve=False) as world:
            features = replace(RICH, persistent=persistent)
            async with model_disk(
                world, features, max_queues=1, feature_persistent=feature_persistent
            ) as (disk, _):
                for _ in range(10):
                    await disk.write(0, bytes(4096))
                counted = disk.counters()
                return counted.granted, counted.reused

    assert run(counters(True, True)) == (1, 9)
    assert run(counters(False, True)) == (10, 0)
    assert run(counters(True, False)) == (10, 0)


@pytest.mark.beyond_xen("limits")
def test_where_grants_are_short_there_are_fewer_queues_and_smaller_rings() -> None:
    async def work() -> None:
        small = Limits(pages=512, grefs=64, tracks=512, ports=64)
        async with disk_world(serve=False, limits=small) as world:
            async with model_disk(world, max_queues=4, max_ring_page_order=6) as (disk, backend):
                data = random.Random(1).randbytes(300_000)
                await disk.write(0, data)
                assert await disk.read(0, len(data)) == data
                assert backend.config is not None
                assert (len(backend.config.queues), backend.config.ring_pages) == (1, 32)

    run(work())


def test_one_broken_ring_ends_the_disk_with_all_its_queues() -> None:
    async def work() -> None:
        async with disk_world(serve=False, limits=LARGE) as world:
            async with model_disk(world, max_queues=4) as (disk, backend):
                backend.paused = True
                waiting = [asyncio.ensure_future(disk.read(i * 8192, 512)) for i in range(8)]
                await until(lambda: len(backend.seen) == 8)
                backend.rings[2].mapping.view.cast("I")[2] = 4000
                backend.rings[2].port.notify()
                outcomes = await asyncio.gather(*waiting, return_exceptions=True)
                assert all("response_overflow" in str(outcome) for outcome in outcomes)

    run(work())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_queues", 0),
        ("max_queues", 1025),
        ("max_ring_page_order", 7),
        ("max_ring_page_order", -1),
        ("max_indirect_segments", 4097),
        ("pool_pages", 10),
    ],
)
def test_settings_have_bounds(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {value}; it goes from"):
        Settings(**{name: value})


@pytest.mark.parametrize("page_size", [4096, 16384, 65536])
@pytest.mark.parametrize("segments", [0, 32])
def test_guests_with_pages_of_any_size(page_size: int, segments: int) -> None:
    async def work() -> None:
        async with disk_world(serve=False, limits=LARGE) as world:
            features = replace(RICH, max_indirect_segments=segments)
            async with model_disk(world, features, page_size=page_size) as (disk, backend):
                data = random.Random(page_size).randbytes(1_000_000)
                await disk.write(1000, data)
                assert await disk.read(1000, len(data)) == data
                assert backend.storage[1000 : 1000 + len(data)] == data

    run(work())


@pytest.mark.parametrize(
    ("texts", "changed"),
    [
        ([], {}),
        (["max_queues=2", "max_ring_page_order=4"], {"max_queues": 2, "max_ring_page_order": 4}),
        (["feature_persistent=N", "trusted=0"], {"feature_persistent": False, "trusted": False}),
        ([" max_queues = 2 ", "max_queues=3"], {"max_queues": 3}),
        (["page_size=65536"], {"page_size": 65536}),
    ],
)
def test_settings_are_written_as_the_parameters_of_linux(
    texts: list[str], changed: dict[str, int]
) -> None:
    assert Settings.of(texts) == replace(Settings(), **changed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_queues", "sets nothing; write NAME=VALUE with one of max_queues, "),
        ("queues=2", "'queues=2' sets nothing"),
        ("max_queues=Y", "max_queues takes a whole number from 1 to 1024"),
        ("max_queues=-1", "max_queues takes a whole number"),
        ("max_queues=²", "max_queues takes a whole number"),
        ("max_queues=2000", "max_queues is 2000; it goes from 1 to 1024"),
        ("trusted=2", "trusted is 2; it goes from 0 to 1"),
        ("page_size=8192", "it may be 4096, 16384 or 65536"),
    ],
)
def test_what_sets_nothing(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings.of([text])


def test_a_page_size_that_no_guest_has() -> None:
    with pytest.raises(ConfigError, match="page_size is 8192; it may be 4096, 16384 or 65536"):
        Settings(page_size=8192)


def test_where_the_store_has_no_room_there_are_fewer_queues_and_smaller_rings() -> None:
    """A quota on nodes is shared by all disks of a domain: OSv and others have hit it."""

    async def work() -> None:
        async with disk_world(serve=False, limits=LARGE) as world:
            world.host.store.quotas.nodes = 24
            async with model_disk(world, max_queues=4, max_ring_page_order=6) as (disk, backend):
                assert backend.config is not None
                assert (len(backend.config.queues), backend.config.ring_pages) == (1, 8)
                await disk.write(0, b"x" * 100_000)
                assert await disk.read(0, 100_000) == b"x" * 100_000

    run(work())


def test_a_store_without_room_for_one_ring_is_told() -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world:
            await world.guest()
            world.host.store.quotas.nodes = 2
            vbd = await add(world.store, Domid(1), parse_xl_disk("vdev=xvda,target=x"), Domid(0))
            await world.store.write(f"{vbd.backend}/state", "2")
            with pytest.raises(XenstoreError, match="ENOSPC"):
                await world.open(vbd)
            assert world.host.host.accounting()["pages"] == 0

    run(work())


@pytest.mark.beyond_xen("lasting")
def test_grants_that_the_backend_has_dropped_are_ended_every_ten_seconds(monkeypatch) -> None:
    monkeypatch.setattr("xvd.frontend.connection.SCAN_S", 0.001)

    async def work() -> None:
        async with disk_world(serve=False, limits=LARGE) as world:
            async with model_disk(world, max_queues=2) as (disk, backend):
                # All are in flight before one is answered: no grant serves two of them.
                backend.paused = True
                writes = [asyncio.ensure_future(disk.write(i << 17, bytes(4096))) for i in range(8)]
                await until(lambda: len(backend.seen) == 8)
                backend.paused = False
                await asyncio.gather(*writes)
                assert disk.counters().revoked == 0
                for mapping in backend.kept.values():
                    mapping.close()
                backend.kept.clear()
                await until(lambda: disk.counters().revoked == 8)

    run(work())


@pytest.mark.parametrize("size", [4096, 65536, 262_144])
@pytest.mark.parametrize("queues", [1, 3])
def test_a_load_uses_what_both_ends_can_do(size: int, queues: int) -> None:
    async def work() -> None:
        async with disk_world(serve=False, limits=LARGE) as world:
            machine, store = await world.guest()
            vbd = await add(world.store, Domid(1), parse_xl_disk("vdev=xvda,target=x"), Domid(0))
            backend = ModelBackend(world, vbd)
            settings = Settings(max_queues=queues, max_ring_page_order=1)
            job = Job(depth=8, size=size, span=1 << 21, operations=40, write_percent=50)
            path = f"device/vbd/{vbd.vdev}"
            loading = asyncio.ensure_future(run_load(machine, store, path, job, settings=settings))
            await backend.connect()
            await wait_for_state(world.store, vbd.frontend, lambda s: s >= 5, 10)
            await world.store.write(f"{vbd.backend}/state", "6")
            result = await loading
            assert (result.operations, result.errors) == (40, 0)
            assert all(ring.taken for ring in backend.rings)
            assert any(isinstance(r, IndirectRequest) for r in backend.seen) == (size > 45056)
            await backend.close()

    run(work())
