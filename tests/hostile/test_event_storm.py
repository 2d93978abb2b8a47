# SPDX-License-Identifier: Apache-2.0
"""Events without work: they cost their sender's own disk a wake-up, and nobody anything else."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from rig_front import FrontWorld
from rig_queue import GUEST, QueueWorld, rq

from xvd.blkif.abi import Op
from xvd.dataplane.loop.loop import Loop
from xvd.machine.interface import EventChannel


def test_ten_thousand_events_leave_the_queue_serving() -> None:
    with QueueWorld() as world, world.running() as loop:
        for _ in range(10_000):
            world.port.notify()
        world.send(rq(Op.READ, 0, world.segment(0)))
        world.port.notify()
        [answer] = world.collect(1)
        assert answer.status == 0
        assert loop.counters()["wakeups"] <= 10_001


@pytest.mark.beyond_xen("events")
def test_events_collapse_while_nobody_looks() -> None:
    with QueueWorld() as world:
        world.backend_port.consume()
        for _ in range(1000):
            world.port.notify()
        assert [world.backend_port.consume() for _ in range(2)] == [True, False]


@contextmanager
def storm(port: EventChannel) -> Iterator[None]:
    """Events as fast as they can be sent."""
    over = threading.Event()

    def send() -> None:
        while not over.is_set():
            port.notify()

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        over.set()
        sender.join()


def wait_for_spurious(loop: Loop, count: int) -> None:
    while loop.counters()["spurious"] < count:
        threading.Event().wait(0.001)


def test_xsa_391_a_backend_that_floods_a_frontend_is_heard_less_and_less() -> None:
    """Nine events in vain take 127 ms, the tenth comes after as long again."""
    with FrontWorld() as world:
        port = world.backend.event_channels.bind_interdomain(GUEST, world.port.port)
        thread = threading.Thread(target=(loop := Loop(world.queue)).run)
        thread.start()
        begin = time.monotonic()
        with storm(port):
            wait_for_spurious(loop, 9)
            assert time.monotonic() - begin > 0.127
            assert loop.counters()["wakeups"] < 20
        world.queue.stop()
        loop.wake()
        thread.join()


def test_xsa_332_a_frontend_that_floods_a_backend_is_heard_less_and_less() -> None:
    with QueueWorld() as world, world.running() as loop:
        begin = time.monotonic()
        with storm(world.port):
            wait_for_spurious(loop, 9)
            assert time.monotonic() - begin > 0.127


@pytest.mark.beyond_xen("events")
def test_work_ends_the_pause() -> None:
    """A peer that has flooded and then behaves is served at once again."""
    with QueueWorld() as world, world.running() as loop:
        with storm(world.port):
            wait_for_spurious(loop, 5)
        for turn in range(20):
            world.send(rq(Op.READ, 0, world.segment(0), id=turn))
            world.port.notify()
            world.collect(1)
        before = loop.counters()["spurious"]
        for turn in range(20):
            world.send(rq(Op.READ, 0, world.segment(0), id=turn))
            world.port.notify()
            world.collect(1)
        assert loop.counters()["spurious"] == before


def test_an_honest_peer_never_waits() -> None:
    with QueueWorld() as world, world.running() as loop:
        for turn in range(200):
            world.send(rq(Op.READ, 0, world.segment(0), id=turn))
            world.port.notify()
            world.collect(1)
        assert loop.counters()["spurious"] <= 1  # its port is bound with an event pending
