# SPDX-License-Identifier: Apache-2.0
"""The two ends of a simulated disk: the shipped queues, with a sleep that the scheduler can see.

An end that has found nothing to do, and has asked for an event, sleeps until its event is
delivered, something completes, or its watchdog ends. That is what `dataplane/uring` does in a
thread; here the scheduler decides when.
"""

from xvd.blkif.abi import MAX_SEGMENTS_PER_REQUEST, Abi, nr_ents
from xvd.dataplane.front import FrontQueue
from xvd.dataplane.queue import BackendQueue
from xvd.dataplane.ring import FrontRing
from xvd.engines.bridge import BridgeChannel
from xvd.machine.emulated.machine import EmulatedMachine
from xvd.sim.clock import Clock
from xvd.types import Domid

WORKED, BROKEN, DRAINED = 1, 2, 4
WATCHDOG_NS = 5_000_000_000


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

    def __init__(self, machine: EmulatedMachine, clock: Clock, peer: Domid, abi: Abi) -> None:
        super().__init__(clock)
        self.machine = machine
        self.abi = abi
        self.ring = machine.grants.share(peer, 1)
        FrontRing(self.ring.view, nr_ents(1, abi), abi.number).init()
        self.pages = machine.grants.share(peer, nr_ents(1, abi) * MAX_SEGMENTS_PER_REQUEST)
        self.channel = machine.event_channels.alloc_unbound(peer)
        self.queue = FrontQueue(
            self.ring.view, nr_ents(1, abi), abi.number, self.pages, self.channel
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
        journal: bytearray,
    ) -> None:
        super().__init__(clock)
        self.machine = machine
        self.grants = machine.grants.foreign(frontend.machine.domid)
        self.mapping = self.grants.map(frontend.ring.grefs)
        self.channel = machine.event_channels.bind_interdomain(
            frontend.machine.domid, frontend.channel.port
        )
        self.queue = BackendQueue(
            self.mapping.view,
            nr_ents(1, frontend.abi),
            frontend.abi.number,
            self.grants,
            self.channel,
            storage,
            capacity=capacity,
            offered=1 << 0 | 1 << 1 | 1 << 3 | 1 << 5,
            copying=copying,
            journal=journal,
        )
        self.channel.notify()

    def step(self, budget: int) -> int:
        """One step, then sleep if there is nothing to do; STEP_* flags."""
        flags = self.queue.step(budget)
        self._rest(bool(flags & WORKED), self.queue.may_sleep())
        return flags

    def release(self) -> None:
        """Give everything back, as a backend that has drained does."""
        self.mapping.close()
        self.grants.close()
        self.machine.close()

    def die(self) -> None:
        """As SIGKILL does: nothing more is answered, the system takes the mappings away."""
        self.queue.abandon()
        self.release()
