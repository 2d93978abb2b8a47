# SPDX-License-Identifier: Apache-2.0
"""Flush, FUA and discard on backends that offer little, or less than they said."""

import errno
from dataclasses import replace

import pytest
from rig_backend import BARE, RICH, ModelBackend, model_disk, operation_of
from rig_disk import disk_world, run

from xvd.blkif.abi import Op, Status
from xvd.blkif.features import BackendFeatures
from xvd.blkif.messages import DiscardRequest, Request

FLUSHING = replace(BARE, flush=True)
BARRIERS = replace(BARE, barrier=True)
BOTH = replace(BARE, flush=True, barrier=True)
DISCARDING = replace(BARE, discard=True, discard_granularity=4096, discard_alignment=1024)


def operations(backend: ModelBackend) -> list[int]:
    return [operation_of(request) for request in backend.seen]


@pytest.mark.parametrize(
    ("features", "wanted"),
    [
        (FLUSHING, [Op.FLUSH_DISKCACHE]),
        (BARRIERS, [Op.WRITE_BARRIER]),
        (BOTH, [Op.FLUSH_DISKCACHE]),
        (BARE, []),
    ],
)
def test_how_a_flush_is_done(features: BackendFeatures, wanted: list[Op]) -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world, model_disk(world, features) as (disk, backend):
            await disk.flush()
            assert operations(backend) == wanted
            assert disk.can_flush == bool(wanted)
            assert all(isinstance(r, Request) and r.nr_segments == 0 for r in backend.seen)

    run(work())


@pytest.mark.parametrize(
    ("features", "wanted"),
    [
        (FLUSHING, [Op.WRITE, Op.FLUSH_DISKCACHE]),
        (BARRIERS, [Op.WRITE_BARRIER]),
        (BOTH, [Op.WRITE_BARRIER]),
        (BARE, [Op.WRITE]),
    ],
)
def test_how_a_write_is_forced_to_the_medium(features: BackendFeatures, wanted: list[Op]) -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world, model_disk(world, features) as (disk, backend):
            await disk.write(4096, b"x" * 4096, fua=True)
            assert operations(backend) == wanted
            assert backend.storage[4096:8192] == b"x" * 4096

    run(work())


@pytest.mark.parametrize(("offset", "size"), [(0, 45056 + 512), (100, 512), (0, 100)])
def test_a_barrier_carries_one_direct_request_of_whole_blocks(offset: int, size: int) -> None:
    """Anything else is written and then flushed, here by an empty barrier."""

    async def work() -> None:
        async with disk_world(serve=False) as world, model_disk(world, BARRIERS) as (disk, backend):
            await disk.write(offset, b"y" * size, fua=True)
            *_, write, last = backend.seen
            assert (operation_of(write), operation_of(last)) == (Op.WRITE, Op.WRITE_BARRIER)
            assert isinstance(last, Request)
            assert last.nr_segments == 0
            assert backend.storage[offset : offset + size] == b"y" * size

    run(work())


def test_flush_withdrawn_is_replaced_by_barriers_and_then_by_nothing(expect_log) -> None:
    expect_log("the backend has withdrawn flush")
    expect_log("the backend has withdrawn barriers")

    async def work() -> None:
        async with disk_world(serve=False) as world, model_disk(world, BOTH) as (disk, backend):
            backend.refuse[Op.FLUSH_DISKCACHE] = Status.EOPNOTSUPP
            await disk.flush()
            await disk.flush()
            assert disk.can_flush
            backend.refuse[Op.WRITE_BARRIER] = Status.EOPNOTSUPP
            await disk.flush()
            await disk.flush()
            assert not disk.can_flush
            assert operations(backend) == [3, 2, 2, 2]

    run(work())
    assert len(expect_log.lines) == 2


def test_a_barrier_that_fails_without_data_is_not_there(expect_log) -> None:
    """FreeBSD's backend offers barriers and fails the empty ones."""
    expect_log("the backend has withdrawn barriers")

    async def work() -> None:
        async with disk_world(serve=False) as world, model_disk(world, BARRIERS) as (disk, backend):
            backend.refuse[Op.WRITE_BARRIER] = Status.ERROR
            await disk.flush()
            assert not disk.can_flush

    run(work())


def test_a_flush_that_fails_is_an_error() -> None:
    """Data may be lost: Linux's frontend takes it for "not supported", and says nothing."""

    async def work() -> None:
        async with disk_world(serve=False) as world, model_disk(world, FLUSHING) as (disk, backend):
            backend.refuse[Op.FLUSH_DISKCACHE] = Status.ERROR
            with pytest.raises(OSError, match="FLUSH_DISKCACHE of 0 sectors") as caught:
                await disk.flush()
            assert caught.value.errno == errno.EIO
            assert disk.can_flush

    run(work())


@pytest.mark.parametrize("features", [BARRIERS, BOTH])
def test_data_of_a_barrier_that_was_not_taken_is_written_all_the_same(
    features: BackendFeatures, expect_log
) -> None:
    """Linux completes such a request as a success, with its data nowhere."""
    expect_log("the backend has withdrawn barriers")

    async def work() -> None:
        async with disk_world(serve=False) as world, model_disk(world, features) as (disk, backend):
            backend.refuse[Op.WRITE_BARRIER] = Status.EOPNOTSUPP
            await disk.write(0, b"z" * 512, fua=True)
            assert backend.storage[:512] == b"z" * 512
            after = [Op.FLUSH_DISKCACHE] if features.flush else []
            assert operations(backend) == [Op.WRITE_BARRIER, Op.WRITE, *after]

    run(work())


@pytest.mark.parametrize(
    ("offset", "length", "wanted"),
    [
        (0, 8192, (1024, 4096)),
        (1024, 4096, (1024, 4096)),
        (1023, 4098, (1024, 4096)),
        (1025, 8191, (5120, 4096)),
        (1025, 8190, None),
        (0, 5119, None),
        (0, 1 << 20, (1024, (1 << 20) - 4096)),
    ],
)
def test_a_discard_is_of_whole_units(
    offset: int, length: int, wanted: tuple[int, int] | None
) -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world:
            async with model_disk(world, DISCARDING) as (disk, backend):
                assert (disk.discard_granularity, disk.discard_alignment) == (4096, 1024)
                await disk.discard(offset, length)
                found = [(r.sector_number * 512, r.nr_sectors * 512) for r in backend.seen]  # type: ignore[union-attr]
                assert found == ([wanted] if wanted else [])

    run(work())


@pytest.mark.parametrize("granularity", [0, 3, 513, 1000])
def test_a_granularity_that_makes_no_sense_is_a_block(granularity: int) -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world:
            features = replace(DISCARDING, discard_granularity=granularity, discard_alignment=7)
            async with model_disk(world, features) as (disk, backend):
                assert (disk.discard_granularity, disk.discard_alignment) == (512, 0)
                await disk.discard(512, 1024)
                assert backend.seen == [DiscardRequest(backend.seen[0].id, 1, 2, 0, 0xCA00)]

    run(work())


def test_a_secure_discard_covers_all_of_its_range_or_is_refused() -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world, model_disk(world, RICH) as (disk, backend):
            await disk.discard(512, 1024, secure=True)
            [request] = backend.seen
            assert isinstance(request, DiscardRequest)
            assert (request.sector_number, request.nr_sectors, request.flag) == (1, 2, 1)
            with pytest.raises(OSError, match="of whole blocks of 512 bytes") as caught:
                await disk.discard(1, 1024, secure=True)
            assert caught.value.errno == errno.EINVAL

    run(work())


def test_secure_discard_is_offered_on_its_own() -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world, model_disk(world, DISCARDING) as (disk, _):
            assert (disk.can_discard, disk.can_discard_securely) == (True, False)
            with pytest.raises(OSError, match="does not offer secure discard") as caught:
                await disk.discard(0, 512, secure=True)
            assert caught.value.errno == errno.EOPNOTSUPP

    run(work())


@pytest.mark.parametrize("secure", [False, True])
def test_discard_withdrawn_is_not_tried_again(secure: bool, expect_log) -> None:
    expect_log("the backend has withdrawn discard")

    async def work() -> None:
        async with disk_world(serve=False) as world, model_disk(world, RICH) as (disk, backend):
            backend.refuse[Op.DISCARD] = Status.EOPNOTSUPP
            for _ in range(2):
                with pytest.raises(OSError, match=r"DISCARD|discard") as caught:
                    await disk.discard(0, 4096, secure=secure)
                assert caught.value.errno == errno.EOPNOTSUPP
            assert len(backend.seen) == 1
            assert (disk.can_discard, disk.can_discard_securely) == (False, False)
            assert disk.discard_granularity == 0

    run(work())


@pytest.mark.parametrize(
    ("offset", "size", "read", "written"),
    [
        (100, 10, 1, 1),
        (100, 512, 2, 2),
        (100, 100_000, 2, 196),
        (512, 100_001, 1, 196),
        (511, 1, 1, 1),
        (511, 2, 2, 2),
        (1, 511, 1, 1),
    ],
)
def test_an_unaligned_write_reads_its_edges_only(
    offset: int, size: int, read: int, written: int
) -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world, model_disk(world) as (disk, backend):
            before = bytes(i % 251 for i in range(200_000))
            await disk.write(0, before[: 200_000 // 512 * 512])
            start = disk.counters()
            await disk.write(offset, b"#" * size)
            end = disk.counters()
            assert end.rd_sect - start.rd_sect == read
            assert end.wr_sect - start.wr_sect == written
            expected = before[:offset] + b"#" * size + before[offset + size :]
            assert backend.storage[:199_000] == expected[:199_000]

    run(work())


def test_the_parts_of_an_unaligned_write_are_one_request() -> None:
    async def work() -> None:
        # A thread that polls may take the first part before the others are there.
        async with (
            disk_world(serve=False) as world,
            model_disk(world, poll_us=0) as (disk, backend),
        ):
            await disk.write(100, b"#" * 10_000)
            assert operations(backend) == [Op.READ, Op.READ, Op.WRITE]

    run(work())
