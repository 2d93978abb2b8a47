# SPDX-License-Identifier: Apache-2.0
"""A discrete-event model of guests on one backend process, for hosts with more CPUs than this one.

Each guest has two batches of half its depth under way. A batch is worked on by the guest's
frontend thread, then by its backend thread, and so on; each needs one of the host's CPUs for as
long as was measured. Without persistent grants the backend's work on a batch holds, for a part of
it, the one lock that guards its process' mappings, and longer by what each other CPU that runs this
process costs to be told (the TLB shootdown).

The costs are measured on this machine with one guest; how the model does is checked against several
guests on this machine. What it leaves out: caches, memory bandwidth, wake-ups, and all of Xen.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from xvd.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Costs:
    """CPU time of one operation, nanoseconds.

    front, back: of either end, without mapping. mapping: under the lock. shootdown: more of the
    same, for each further CPU that runs the backend.
    """

    front: float
    back: float
    mapping: float = 0.0
    shootdown: float = 0.0


def predict(
    costs: Costs, *, guests: int, cpus: int, depth: int = 32, seconds: float = 0.02
) -> float:
    """Operations per second of all guests together; `ConfigError` without simpy.

    seconds: how much of the modelled time is looked at, after a tenth of it has passed.
    """
    try:
        import simpy
    except ImportError:
        raise ConfigError("the model needs simpy; install xvd[bench]") from None
    env = simpy.Environment()
    processors, lock = simpy.Resource(env, cpus), simpy.Resource(env, 1)
    batch = max(1, depth // 2)
    done = [0]
    warm = seconds * 1e8
    # Every backend thread on a CPU of its own, as far as there are CPUs, is one to be told.
    mapping = costs.mapping + costs.shootdown * (min(guests, cpus) - 1)

    def on_a_cpu(ns: float) -> Generator[Any, Any, None]:
        with processors.request() as cpu:
            yield cpu
            yield env.timeout(ns)

    def under_way(front: Any, back: Any) -> Generator[Any, Any, None]:
        while True:
            with front.request() as mine:
                yield mine
                yield from on_a_cpu(costs.front * batch)
            with back.request() as mine:
                yield mine
                yield from on_a_cpu(costs.back * batch)
                if mapping:
                    with lock.request() as held:
                        yield held
                        yield from on_a_cpu(mapping * batch)
            if env.now >= warm:
                done[0] += batch

    for _ in range(guests):
        front, back = simpy.Resource(env, 1), simpy.Resource(env, 1)
        for _ in range(2 if depth > 1 else 1):
            env.process(under_way(front, back))
    env.run(until=warm + seconds * 1e9)
    return done[0] / seconds
