# SPDX-License-Identifier: Apache-2.0
"""Events without work: they cost their sender's own disk a wake-up, and nobody anything else."""

from rig_queue import QueueWorld, rq

from xvd.blkif.abi import Op


def test_ten_thousand_events_leave_the_queue_serving() -> None:
    with QueueWorld() as world, world.running() as loop:
        for _ in range(10_000):
            world.port.notify()
        world.send(rq(Op.READ, 0, world.segment(0)))
        world.port.notify()
        [answer] = world.collect(1)
        assert answer.status == 0
        assert loop.counters()["wakeups"] <= 10_001


def test_events_collapse_while_nobody_looks() -> None:
    with QueueWorld() as world:
        world.backend_port.consume()
        for _ in range(1000):
            world.port.notify()
        assert [world.backend_port.consume() for _ in range(2)] == [True, False]
