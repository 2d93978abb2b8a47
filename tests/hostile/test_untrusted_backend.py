# SPDX-License-Identifier: Apache-2.0
"""XSA-403: what a backend can see in a frontend's pages besides the data that it is to have."""

import pytest
from rig_backend import model_disk
from rig_disk import disk_world, run
from rig_front import FrontWorld

from xvd.blkif.messages import IndirectRequest

READ, WRITE = 0, 1
KEEPING = pytest.mark.parametrize("persistent", [False, True], ids=["fleeting", "persistent"])


def used(world: FrontWorld) -> None:
    """Every page of the pool has held something."""
    world.queue.submit(WRITE, 0, 256, b"\xee" * 256 * 512, 1)
    world.serve()
    world.queue.reap()


def untrusting(persistent: bool) -> FrontWorld:
    return FrontWorld(
        segments_max=32, pool=33, persistent=persistent, keeping=persistent, trusted=False
    )


@KEEPING
@pytest.mark.parametrize("sectors", [1, 7, 9, 100])
def test_xsa_403_nothing_stands_behind_the_data_of_a_write(persistent: bool, sectors: int) -> None:
    with untrusting(persistent) as world:
        used(world)
        world.queue.submit(WRITE, 0, sectors, b"\x11" * sectors * 512, 2)
        [request] = world.requests()
        pages = b"".join(bytes(world.page(s.gref)) for s in world.segments(request))
        assert pages == (b"\x11" * sectors * 512).ljust(len(pages), b"\0")
        world.reply(request)


@KEEPING
def test_xsa_403_a_page_to_be_read_into_is_empty(persistent: bool) -> None:
    with untrusting(persistent) as world:
        used(world)
        world.queue.submit(READ, 0, 100, bytearray(100 * 512), 2)
        [request] = world.requests()
        assert not any(b"".join(bytes(world.page(s.gref)) for s in world.segments(request)))
        world.reply(request)


@KEEPING
def test_xsa_403_nothing_stands_behind_the_descriptors(persistent: bool) -> None:
    with untrusting(persistent) as world:
        used(world)
        world.queue.submit(READ, 0, 256, bytearray(256 * 512), 2)
        [request] = world.requests()
        assert isinstance(request, IndirectRequest)
        page = bytes(world.page(request.indirect_grefs[0]))
        assert any(page[: 32 * 8])
        assert not any(page[32 * 8 :])
        world.reply(request)


@pytest.mark.parametrize(
    ("node", "setting", "wanted"),
    [("1", True, 0), ("0", True, 3584), ("1", False, 3584), ("0", False, 3584)],
)
def test_the_toolstack_or_the_user_says_whom_to_trust(
    node: str, setting: bool, wanted: int
) -> None:
    """The node lies in the guest's own directory: only the guest relies on it."""

    async def work() -> None:
        async with disk_world(serve=False) as world:
            async with model_disk(
                world, max_queues=1, trusted=setting, nodes={"trusted": node}
            ) as (
                disk,
                backend,
            ):
                await disk.write(0, b"\xee" * 4096)
                await disk.write(0, b"\x11" * 512)
                [page] = [mapping.view for mapping in backend.kept.values()]
                assert bytes(page[512:]).count(0) == wanted

    run(work())
