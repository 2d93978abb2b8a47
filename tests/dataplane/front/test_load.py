# SPDX-License-Identifier: Apache-2.0
"""The load generator: the same seed is the same load, and it may end early."""

import gc
import threading

import pytest
from rig_front import FrontWorld
from rig_queue import QueueWorld

from xvd.blkif.messages import Request
from xvd.dataplane.front.load import Load
from xvd.dataplane.front.options import FrontOptions
from xvd.dataplane.front.queue import FrontQueue
from xvd.dataplane.loop.loop import Loop
from xvd.errors import LocalProtocolError


def places(seed: int) -> list[tuple[int, int]]:
    with FrontWorld() as world:
        load = Load(
            world.queue, depth=4, size=4096, span=1 << 20, operations=4, write_percent=50, seed=seed
        )
        requests = world.requests()
        found = [(r.operation, r.sector_number) for r in requests if isinstance(r, Request)]
        del load
        return found


def test_a_seed_means_the_same_load_everywhere() -> None:
    assert places(1) == places(1) != places(2)


def test_a_load_runs_to_its_end() -> None:
    with QueueWorld() as world, world.running():
        pages = world.guest.grants.share(world.backend.domid, 32 * 11)
        front = FrontQueue(world.ring_pages.view, 32, 0, pages, world.port, FrontOptions())
        load = Load(front, depth=8, size=4096, span=1 << 20, operations=500, write_percent=30)
        Loop(load).run()
        assert load.result[:2] == (500, 0)


@pytest.mark.parametrize("issued", [0, 1])
def test_a_load_that_ends_early_leaves_its_queue_whole(issued: int) -> None:
    """Its operations are its own memory: the queue once freed them piece by piece, and crashed."""
    with FrontWorld() as world:
        load = Load(world.queue, depth=64, size=4096, span=1 << 20, operations=1000)
        for _ in range(issued):
            world.requests()
        load.stop()
        del load
        gc.collect()
        world.drop_queue()
        gc.collect()


def test_a_load_can_be_stopped_from_another_thread() -> None:
    with QueueWorld() as world, world.running():
        pages = world.guest.grants.share(world.backend.domid, 32 * 11)
        front = FrontQueue(world.ring_pages.view, 32, 0, pages, world.port, FrontOptions())
        load = Load(front, depth=64, size=4096, span=1 << 20, operations=1 << 60)
        thread = threading.Thread(target=(loop := Loop(load)).run)
        thread.start()
        while load.result[0] < 1000:
            pass
        load.stop()
        loop.wake()
        thread.join()
        assert front.in_flight == 0


@pytest.mark.parametrize(
    "wrong", [{"size": 0}, {"size": 100}, {"span": 4095}, {"depth": 0}, {"operations": 0}]
)
def test_loads_that_make_no_sense(wrong: dict[str, int]) -> None:
    right = {"depth": 1, "size": 4096, "span": 4096, "operations": 1}
    with FrontWorld() as world, pytest.raises(LocalProtocolError, match="no load of"):
        Load(world.queue, **(right | wrong))
