# SPDX-License-Identifier: Apache-2.0
"""A backend that abuses what persistent and indirect requests let it keep."""

import asyncio

import pytest
from rig_backend import model_disk
from rig_disk import disk_world, run
from rig_front import FrontWorld
from rig_queue import BROKEN, DRAINED

from xvd.blkif.messages import IndirectRequest
from xvd.errors import GrantError

READ, WRITE = 0, 1


@pytest.mark.beyond_xen("lasting")
def test_xsa_396_a_page_kept_without_persistent_grants_ends_the_device() -> None:
    """Both have to offer them: a backend that keeps pages all the same is not believed."""
    with FrontWorld(persistent=False, keeping=True) as world:
        world.queue.submit(READ, 0, 8, bytearray(4096), 1)
        [request] = world.requests()
        world.data(request)
        assert world.reply(request) == BROKEN | DRAINED
        assert world.queue.breach == "grant_still_mapped"
        assert world.queue.reap() == []


@pytest.mark.beyond_xen("lasting")
def test_xsa_396_pages_that_are_kept_after_the_end_are_nobodys_until_let_go() -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world:
            async with model_disk(world, max_queues=1) as (disk, backend):
                await disk.write(0, b"secret!!" * 512)
                [held] = backend.kept.values()
                await disk._leave(abandon=True)
                assert bytes(held.view[:6]) == b"secret"
                assert world.host.host.accounting()["pages"] > 0
            assert world.host.host.accounting()["pages"] == 0

    run(work())


def test_a_page_that_changes_while_it_is_kept_changes_nothing_that_was_read() -> None:
    buffer = bytearray(4096)
    with FrontWorld(persistent=True, keeping=True) as world:
        world.queue.submit(READ, 0, 8, buffer, 1)
        [request] = world.serve(b"true")
        [segment] = world.segments(request)
        kept = world.page(segment.gref)
        assert isinstance(kept, memoryview)
        kept[:] = b"lie!" * 1024
        assert buffer == b"true" * 1024


def test_a_page_that_changes_before_it_is_written_from_again_is_overwritten() -> None:
    with FrontWorld(persistent=True, keeping=True) as world:
        world.queue.submit(WRITE, 0, 8, b"1" * 4096, 1)
        [first] = world.serve()
        kept = world.page(world.segments(first)[0].gref)
        assert isinstance(kept, memoryview)
        kept[:] = b"?" * 4096
        world.queue.submit(WRITE, 0, 8, b"2" * 4096, 2)
        [second] = world.requests()
        assert world.data(second) == b"2" * 4096
        world.reply(second)


def test_descriptors_that_the_backend_rewrites_are_not_read_back() -> None:
    """Persistent descriptors are writable for it: what is in them is its own affair."""
    buffer = bytearray(256 * 512)
    with FrontWorld(segments_max=32, pool=64, persistent=True, keeping=True) as world:
        world.queue.submit(READ, 0, 256, buffer, 1)
        [request] = world.requests()
        assert isinstance(request, IndirectRequest)
        world.fill(request, b"data")
        descriptors = world.page(request.indirect_grefs[0])
        assert isinstance(descriptors, memoryview)
        descriptors[:] = b"\xff" * 4096
        world.reply(request)
        assert world.queue.reap() == [(1, 0)]
        assert buffer == b"data" * 128 * 256
        world.queue.submit(WRITE, 0, 256, bytes(buffer), 2)
        [again] = world.requests()
        assert world.data(again) == buffer
        world.reply(again)


@pytest.mark.beyond_xen("lasting")
def test_a_grant_that_was_ended_cannot_be_mapped_again() -> None:
    with FrontWorld(persistent=True, keeping=True) as world:
        world.queue.submit(WRITE, 0, 8, bytes(4096), 1)
        [request] = world.serve()
        [segment] = world.segments(request)
        world.let_go(segment.gref)
        world.queue.scan()
        world.queue.step()
        with pytest.raises(GrantError):
            world.grants.map([segment.gref])


def test_a_backend_that_lets_go_and_maps_again_all_the_time_costs_no_page() -> None:
    with FrontWorld(pool=16, persistent=True, keeping=True) as world:
        for turn in range(200):
            world.queue.submit(WRITE, 0, 40, bytes(40 * 512), turn)
            world.serve()
            if turn % 3 == 0:
                world.let_go()
            if turn % 5 == 0:
                world.queue.scan()
        counters = world.queue.counters()
        assert len(world.queue.reap()) == 200
        assert counters["granted"] - counters["revoked"] <= 16


@pytest.mark.parametrize("pad", [b"\xff", b"\0", b"\x5a"])
@pytest.mark.parametrize("ring_pages", [1, 4])
def test_xsa_216_what_lies_between_the_fields_of_a_response_means_nothing(
    pad: bytes, ring_pages: int
) -> None:
    """A backend that answers with its own memory in the gaps (089bc014) is served as any other."""
    with FrontWorld(ring_pages=ring_pages) as world:
        for turn in range(100):
            world.queue.submit(WRITE, 0, 8, bytes(4096), turn)
            requests = world.requests()
            world.mapping.view[64:] = pad * (len(world.mapping.view) - 64)
            world.reply(*requests)
            assert world.queue.reap() == [(turn, 0)]


@pytest.mark.parametrize("ring_pages", [1, 2, 16, 64])
def test_ids_are_bounded_by_the_ring_however_large(ring_pages: int) -> None:
    with FrontWorld(ring_pages=ring_pages, pool=64) as world:
        world.queue.submit(WRITE, 0, 8, bytes(4096), 1)
        world.requests()
        world.answer(ring_pages * 32, WRITE)
        assert world.push() == BROKEN | DRAINED
        assert world.queue.breach == "unknown_id"


def test_one_answer_for_two_linked_requests_ends_neither() -> None:
    with FrontWorld(page_grants=16) as world:
        world.queue.submit(WRITE, 0, 128, bytes(65536), 1)
        first, _ = world.requests()
        world.answer(first.id, WRITE)
        world.answer(first.id, WRITE)
        assert world.push() == BROKEN | DRAINED
        assert world.queue.breach == "not_in_flight"
        assert world.queue.reap() == []


def test_a_backend_that_never_answers_does_not_stop_a_disk_from_closing() -> None:
    async def work() -> None:
        async with disk_world(serve=False) as world:
            async with model_disk(world) as (disk, backend):
                backend.paused = True
                reading = asyncio.ensure_future(disk.read(0, 512))
                await asyncio.sleep(0)
                await disk._leave(abandon=True)
                with pytest.raises(OSError, match="the disk is gone"):
                    await reading

    run(work())
