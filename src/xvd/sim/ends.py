# SPDX-License-Identifier: Apache-2.0
"""The two ends of a simulated disk: the shipped queues, with a sleep that the scheduler can see.

An end that has found nothing to do, and has asked for an event, sleeps until its event is
delivered, something completes, or its watchdog ends. That is what `dataplane/uring` does in a
thread; here the scheduler decides when.
"""

from xvd.blkif.abi import MAX_SEGMENTS_PER_REQUEST, Abi, Op, nr_ents
from xvd.dataplane.front import FrontQueue
from xvd.dataplane.queue import BackendQueue
from xvd.dataplane.ring import FrontRing
from xvd.engines.bridge import BridgeChannel
from xvd.machine.emulated.machine import EmulatedMachine
from xvd.sim.clock import Clock
from xvd.types import Domid

WORKED, BROKEN, DRAINED = 1, 2, 4
WATCHDOG_NS = 5_000_000_000
OFFERED = sum(
    1 << op for op in (Op.READ, Op.WRITE, Op.WRITE_BARRIER, Op.FLUSH_DISKCACHE, Op.DISCARD)
)


class _End:
    """Common to both: asleep or awake, and the event that is under way to it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.awake = True
        self.deadline_ns = 0

    def wake(self) -> None:
        """Something happened that ends the sleep."""
        self.awake = True

    def _rest(self, worked: bool, may_sleep: bool) -> None:
        self.awake = worked or not may_sleep
        if not self.awake:
            self.deadline_ns = self._clock.now_ns + WATCHDOG_NS


class SimFrontend(_End):
    """A frontend process: ring, pages, port and queue, in a session of its own."""

    def __init__(
        self,
        machine: EmulatedMachine,
        clock: Clock,
        peer: Domid,
        abi: Abi,
        *,
        segments_max: int,
        persistent: bool,
    ) -> None:
        super().__init__(clock)
        self.machine = machine
        self.abi = abi
        self.segments_max = segments_max
        self.persistent = persistent
        self.ring = machine.grants.share(peer, 1)
        FrontRing(self.ring.view, nr_ents(1, abi), abi.number).init()
        pages = max(
            FrontQueue.pages_needed(segments_max), nr_ents(1, abi) * MAX_SEGMENTS_PER_REQUEST
        )
        self.pages = machine.grants.share(peer, pages)
        self.channel = machine.event_channels.alloc_unbound(peer)
        self.queue = FrontQueue(
            self.ring.view,
            nr_ents(1, abi),
            abi.number,
            self.pages,
            self.channel,
            segments_max=segments_max,
            persistent=persistent,
        )

    def step(self, budget: int) -> int:
        """One step, then sleep if there is nothing to do; STEP_* flags."""
        flags = self.queue.step(budget)
        self._rest(bool(flags & WORKED), self.queue.may_sleep())
        return flags

    def die(self) -> None:
        """As SIGKILL does: the session is over; pages that are mapped are freed later."""
        self.machine.close()


class SimBackend(_End):
    """A backend process: a mapped ring, a bound port and queue, in a session of its own."""

    def __init__(
        self,
        machine: EmulatedMachine,
        clock: Clock,
        frontend: SimFrontend,
        storage: BridgeChannel,
        *,
        capacity: int,
        copying: bool,
        persistent_max: int,
        max_pages: int,
        journal: bytearray,
    ) -> None:
        super().__init__(clock)
        self.machine = machine
        self.grants = machine.grants.foreign(frontend.machine.domid)
        self.mapping = self.grants.map(frontend.ring.grefs)
        self.channel = machine.event_channels.bind_interdomain(
            frontend.machine.domid, frontend.channel.port
        )
        indirect = frontend.segments_max > MAX_SEGMENTS_PER_REQUEST
        self.queue = BackendQueue(
            self.mapping.view,
            nr_ents(1, frontend.abi),
            frontend.abi.number,
            self.grants,
            self.channel,
            storage,
            capacity=capacity,
            offered=OFFERED | (1 << Op.INDIRECT if indirect else 0),
            indirect_max=frontend.segments_max if indirect else 0,
            copying=copying,
            persistent=frontend.persistent,
            persistent_max=persistent_max,
            max_pages=max_pages,
            journal=journal,
        )
        self.channel.notify()

    def step(self, budget: int) -> int:
        """One step, then sleep if there is nothing to do; STEP_* flags."""
        self.queue.set_time(self._clock.now_ns)
        flags = self.queue.step(budget)
        self._rest(bool(flags & WORKED), self.queue.may_sleep())
        return flags

    def release(self) -> None:
        """Give everything back, as a backend that has drained does."""
        self.queue.release()
        self.mapping.close()
        self.grants.close()
        self.machine.close()

    def die(self) -> None:
        """As SIGKILL does: nothing more is answered, the system takes the mappings away."""
        self.queue.abandon()
        self.release()
