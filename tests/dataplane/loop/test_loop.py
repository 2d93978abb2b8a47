# SPDX-License-Identifier: Apache-2.0
"""The native thread's loop: it sleeps, is woken, drains, and leaves."""

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from rig_engines import ByHand, PythonEngine
from rig_front import FrontWorld
from rig_queue import QueueWorld, rq

from xvd.blkif.abi import Op
from xvd.dataplane.loop.loop import Loop
from xvd.dataplane.loop.waiting import sleep_cost_s
from xvd.engines.interface import Engine
from xvd.engines.uri import open_engine


def test_a_running_queue_answers_and_sends_an_event() -> None:
    with QueueWorld() as world, world.running():
        world.send(rq(Op.READ, 0, world.segment(0)))
        world.port.notify()
        [answer] = world.collect(1)
    assert answer.status == 0


def test_a_stopped_queue_ends_its_loop_when_the_storage_has_answered() -> None:
    engine = ByHand(1 << 20)
    with QueueWorld(engine) as world:
        thread = threading.Thread(target=(loop := Loop(world.queue)).run)
        thread.start()
        world.send(rq(Op.READ, 0, world.segment(0)))
        world.port.notify()
        engine.channel.wait()
        [operation] = engine.channel.take()
        world.queue.stop()
        loop.wake()
        operation.complete(0)
        thread.join()
        assert [answer.status for answer in world.responses()] == [0]


def test_leave_ends_a_loop_with_requests_in_flight() -> None:
    engine = ByHand(1 << 20)
    with QueueWorld(engine) as world:
        thread = threading.Thread(target=(loop := Loop(world.queue)).run)
        thread.start()
        world.send(rq(Op.FLUSH_DISKCACHE))
        world.port.notify()
        engine.channel.wait()
        [operation] = engine.channel.take()
        loop.leave()
        thread.join()
        assert world.queue.in_flight == 1
        operation.complete(0)


@pytest.mark.beyond_xen("events")
def test_the_watchdog_finds_a_request_whose_event_was_lost() -> None:
    with QueueWorld() as world:
        loop = Loop(world.queue, watchdog_s=0.01)
        thread = threading.Thread(target=loop.run)
        thread.start()
        while loop.counters()["sleeps"] < 2:
            os.sched_yield()
        world.send(rq(Op.READ, 0, world.segment(0)))
        [answer] = world.collect(1)
        world.queue.stop()
        loop.wake()
        thread.join()
        assert answer.status == 0
        assert loop.counters()["watchdogs"] > 0


def test_a_watchdog_that_finds_nothing_comes_later_and_later() -> None:
    with QueueWorld() as world:
        loop = Loop(world.queue, watchdog_s=0.0001)
        assert loop.nap_s == 0.0001
        thread = threading.Thread(target=loop.run)
        thread.start()
        while loop.nap_s < 0.0006:
            os.sched_yield()
        world.queue.stop()
        loop.wake()
        thread.join()
        assert loop.nap_s == 0.0006


def test_a_frontend_that_waits_for_nothing_needs_no_watchdog() -> None:
    with FrontWorld() as world:
        loop = Loop(world.queue, watchdog_s=1e-6)
        thread = threading.Thread(target=loop.run)
        thread.start()
        for _ in range(20):
            slept = loop.counters()["sleeps"]
            loop.wake()
            while loop.counters()["sleeps"] == slept:
                os.sched_yield()
        world.queue.stop()
        loop.wake()
        thread.join()
        assert loop.counters()["watchdogs"] == 0


def test_a_broken_ring_ends_the_loop() -> None:
    with QueueWorld() as world:
        loop = Loop(world.queue)
        world.ring_pages.view.cast("I")[0] = 99
        loop.run()
        assert world.queue.broken


@pytest.mark.parametrize("rounds", [20])
def test_a_queue_that_comes_and_goes_loses_no_response(rounds: int) -> None:
    with QueueWorld() as world, world.running():
        for turn in range(rounds):
            world.send(*(rq(Op.READ, i, world.segment(i), id=turn * 16 + i) for i in range(16)))
            world.port.notify()
            assert sorted(a.id for a in world.collect(16)) == [turn * 16 + i for i in range(16)]


def test_a_queue_that_is_looked_at_needs_no_event() -> None:
    with QueueWorld() as world:
        thread = threading.Thread(target=(loop := Loop(world.queue, poll_s=60)).run)
        thread.start()
        for number in range(3):
            world.send(rq(Op.READ, 0, world.segment(0), id=number))
            while world.queue.counters()["responses"] <= number:
                pass
        world.queue.stop()
        thread.join()
        assert loop.counters()["sleeps"] == 0


def test_a_thread_that_waits_long_each_time_looks_less_and_less() -> None:
    with QueueWorld() as world:
        loop = Loop(world.queue, poll_s=0.0005, watchdog_s=0.001)
        thread = threading.Thread(target=loop.run)
        thread.start()
        while loop.counters()["poll_ns"]:
            pass
        world.queue.stop()
        loop.wake()
        thread.join()
        assert loop.counters()["sleeps"] > 0


def test_what_a_sleep_costs_is_measured_once() -> None:
    cost_s = sleep_cost_s()

    assert 1e-9 <= cost_s == sleep_cost_s()


def test_the_longest_look_follows_what_the_threads_own_sleeps_cost() -> None:
    # No sleep is cheaper than one between two threads; this one's are of the same kind.
    with QueueWorld() as world:
        loop = Loop(world.queue, poll_s=None, watchdog_s=0.0001)
        thread = threading.Thread(target=loop.run)
        thread.start()
        while loop.counters()["sleeps"] < 100:
            pass
        world.queue.stop()
        loop.wake()
        thread.join()
        found = loop.counters()
        assert found["poll_max_ns"] >= int(sleep_cost_s() * 1e9)
        assert found["poll_ns"] <= found["poll_max_ns"]


def test_a_queue_that_is_held_off_asks_for_no_event_until_its_time_is_over() -> None:
    with QueueWorld() as world:
        thread = threading.Thread(target=(loop := Loop(world.queue, holdoff_s=3600)).run)
        thread.start()
        while loop.counters()["sleeps"] < 2:
            os.sched_yield()
        world.send(rq(Op.READ, 0, world.segment(0), id=1))
        world.port.notify()
        first = world.collect(1)
        while loop.counters()["sleeps"] < 3:  # a new port has an event; the third is held off
            os.sched_yield()
        wanted = world.send(rq(Op.READ, 0, world.segment(0), id=2))
        loop.wake()
        second = world.collect(1)
        world.queue.stop()
        loop.wake()
        thread.join()
        assert [answer.id for answer in first + second] == [1, 2]
        assert not wanted


def test_a_queue_whose_hold_off_has_found_nothing_asks_for_an_event_again() -> None:
    with QueueWorld() as world:
        thread = threading.Thread(target=(loop := Loop(world.queue, holdoff_s=0.0001)).run)
        thread.start()
        for number in range(20):
            # Two at the beginning, as a new port has an event; then one held off, and another.
            while loop.counters()["sleeps"] < 2 + 2 * number:
                os.sched_yield()
            assert world.send(rq(Op.READ, 0, world.segment(0), id=number))
            world.port.notify()
            assert [answer.id for answer in world.collect(1)] == [number]
        world.queue.stop()
        loop.wake()
        thread.join()
        assert loop.counters()["watchdogs"] == 0


def test_storage_of_every_kind_is_exchanged_under_a_running_thread(tmp_path: Path) -> None:
    # A file's operations are on the thread's io_uring; an engine in Python has a descriptor.
    image = tmp_path / "image"
    image.write_bytes(b"f" * (1 << 20))
    kinds: list[Callable[[], Engine]] = [
        lambda: open_engine("memory:1M"),
        lambda: open_engine(f"file:{image}"),
        lambda: PythonEngine(1 << 20),
    ]
    rest_fd = os.eventfd(0, os.EFD_CLOEXEC)
    with QueueWorld() as world, contextlib.ExitStack() as last:
        thread = threading.Thread(target=(loop := Loop(world.queue)).run)
        thread.start()
        for number in range(12):
            engine = kinds[number % 3]()
            channel = engine.open_channel()
            world.queue.pause(rest_fd)
            loop.wake()
            os.eventfd_read(rest_fd)
            world.queue.exchange(channel)
            loop.wake()
            os.eventfd_read(rest_fd)
            assert world.queue.exchanged
            last.close()
            last.callback(engine.close)
            last.callback(channel.close)
            world.queue.resume()
            loop.wake()
            world.data(0)[:] = bytes([number]) * 4096
            world.send(rq(Op.WRITE, 0, world.segment(0), id=number))
            world.port.notify()
            assert [(a.id, a.status) for a in world.collect(1)] == [(number, 0)]
            found = bytearray(4096)
            engine.read(memoryview(found), 0)
            assert found == bytes([number]) * 4096
        world.queue.stop()
        loop.wake()
        thread.join()
        world.queue.release()
    os.close(rest_fd)
