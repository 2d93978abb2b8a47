# SPDX-License-Identifier: Apache-2.0
"""What the model's costs are on this machine, each measured by itself and without any guest.

One thread steps both ends of a ring alternately, with all of the depth under way: nobody waits or
polls in vain, and what Python costs falls out. Two threads that do so without persistent grants,
each with a ring of its own, show what mapping costs where two CPUs do it in one process; two
processes that yield one CPU to each other show what a switch costs. A figure is the median of many
short times, so that what else runs on the machine does not count.
"""

import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from xvd.bench.model import Costs
from xvd.bench.pair import Pair
from xvd.bench.report import Table
from xvd.frontend.load import Job

_YIELDS = 1000
_YIELDER = f"""
import os, sys
os.sched_setaffinity(0, {{int(sys.argv[1])}})
print(flush=True)
while os.getppid() == int(sys.argv[2]):
    for _ in range({_YIELDS}):
        os.sched_yield()
"""


def costs(job: Job, *, seconds: float, lasting: str, passing: str = "") -> Costs:
    """Of the job with persistent grants on the engine `lasting`, and, where it is given, with
    mapping on the engine `passing`. seconds: how long each measurement takes.
    """
    endless = replace(job, operations=1 << 40)
    front, back = _alone(Pair(lasting, endless), seconds)
    found = Costs(front=front, back=back, switch=_switch(seconds))
    if not passing:
        return found
    _, mapped = _alone(Pair(passing, endless, persistent=False), seconds)
    together = _together([Pair(passing, endless, persistent=False) for _ in range(2)], seconds)
    # Of two that always wait for each other, each takes as long as both hold the lock.
    shared = max(0.0, together / 2 - mapped)
    return replace(found, mapping=max(0.0, mapped - back), shared=shared)


def table(found: Costs) -> Table:
    """The costs for a report."""
    rows = [
        ("front, each", found.front),
        ("back, each", found.back),
        ("switch", found.switch),
    ]
    if found.mapping:
        rows += [
            ("mapping, each", found.mapping),
            ("mapping, each, for another CPU that maps", found.shared),
        ]
    return Table(("the model's costs", "ns"), rows)


def _turn(pair: Pair) -> tuple[float, float]:
    """Nanoseconds of all that is under way at either end. The load issues at its second step what
    ended at its first."""
    begun = time.perf_counter_ns()
    pair.load.step()
    pair.load.step()
    front = time.perf_counter_ns() - begun
    begun = time.perf_counter_ns()
    pair.back.step()
    return front, time.perf_counter_ns() - begun


def _repeat(seconds: float, work: Callable[[], None]) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        work()


def _alone(pair: Pair, seconds: float) -> tuple[float, float]:
    """Nanoseconds of one operation at either end."""
    turns: list[tuple[float, float]] = []
    _repeat(seconds, lambda: turns.append(_turn(pair)))
    front, back = (statistics.median(times) / pair.depth for times in zip(*turns, strict=True))
    return front, back


def _together(pairs: list[Pair], seconds: float) -> float:
    """Nanoseconds of an operation at the back of either pair while the other is at work too; 0 if
    that never was so, as on a single CPU."""
    done, both = [0, 0], list[float]()

    def work(mine: int) -> None:
        before = done[1 - mine]
        _, back = _turn(pairs[mine])
        done[mine] += 1
        # Neither stood still meanwhile, nor had this thread to wait for a CPU.
        if 1 <= done[1 - mine] - before <= 2:
            both.append(back / pairs[mine].depth)

    threads = [
        threading.Thread(target=_repeat, args=(seconds, lambda n=n: work(n))) for n in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statistics.median(both) if both else 0.0


def _switch(seconds: float) -> float:
    """Nanoseconds from when a process gives up its CPU until the next runs."""
    cpus = os.sched_getaffinity(0)
    cpu = max(cpus)
    words = [sys.executable, "-c", _YIELDER, str(cpu), str(os.getpid())]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        rounds: list[float] = []

        def work() -> None:
            begun = time.perf_counter_ns()
            for _ in range(_YIELDS):
                os.sched_yield()
            rounds.append((time.perf_counter_ns() - begun) / _YIELDS / 2)

        try:
            os.sched_setaffinity(0, {cpu})
            _repeat(seconds, work)
        finally:
            os.sched_setaffinity(0, cpus)
            other.kill()
    return statistics.median(rounds)
