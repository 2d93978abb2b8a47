# SPDX-License-Identifier: Apache-2.0
"""A discrete-event model of guests on one backend process, for hosts with more CPUs than this one.

Each guest has a thread, and so has its disk in the backend. A thread takes all the operations that
wait for it, works on them on one of the host's CPUs, and hands them to the other end. Where there
are more threads than CPUs, each round begins with a switch from another thread. Without
persistent grants the backend's work holds, for most of it, the one lock that guards its process'
mappings, and longer for each other CPU that maps in this process too (waiting for the lock, and the
TLB shootdown); who waits for the lock keeps its CPU, as Linux's waiters do that spin.

What each of this costs is measured by `calibrate`, without any guest; the model is checked against
guests on this machine. It leaves out caches, memory bandwidth, sleeping and waking, and all of Xen.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from xvd.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Costs:
    """CPU time, nanoseconds.

    front, back: of one operation at either end, without mapping. switch: of going on with another
    process' thread. mapping: of mapping and unmapping one operation, under the lock; shared: more
    of the same, for each further CPU that maps in the backend.
    """

    front: float
    back: float
    switch: float
    mapping: float = 0.0
    shared: float = 0.0


def predict(
    costs: Costs, *, guests: int, cpus: int, depth: int = 32, seconds: float = 0.02
) -> float:
    """Operations per second of all guests together; `ConfigError` without simpy.

    seconds: how much of the modelled time is counted, after a tenth of it has passed.
    """
    try:
        import simpy
    except ImportError:
        raise ConfigError("the model needs simpy; install xvd[bench]") from None
    env = simpy.Environment()
    processors, lock = simpy.Resource(env, cpus), simpy.Resource(env, 1)
    turn = costs.switch if 2 * guests > cpus else 0.0
    mapping = costs.mapping + costs.shared * (min(guests, cpus) - 1)
    warm, done = seconds * 1e8, [0]

    def thread(
        inbox: Any, outbox: Any, ns: float, locked_ns: float, count: list[int]
    ) -> Generator[Any, Any, None]:
        while True:
            waiting = yield inbox.get()
            with processors.request() as cpu:
                yield cpu
                waiting += sum(inbox.items)
                inbox.items.clear()
                yield env.timeout(turn + ns * waiting)
                if locked_ns:
                    with lock.request() as held:
                        yield held
                        yield env.timeout(locked_ns * waiting)
            outbox.put(waiting)
            if env.now >= warm:
                count[0] += waiting

    for _ in range(guests):
        requests, responses = simpy.Store(env), simpy.Store(env)
        requests.put(depth - depth // 2)
        if depth > 1:
            responses.put(depth // 2)
        env.process(thread(responses, requests, costs.front, 0.0, [0]))
        env.process(thread(requests, responses, costs.back, mapping, done))
    env.run(until=warm + seconds * 1e9)
    return done[0] / seconds
