# SPDX-License-Identifier: Apache-2.0
"""The two ends of a simulated disk: the shipped queues, with a sleep that the scheduler can see.

An end that has found nothing to do, and has asked for an event, sleeps until its event is
delivered, something completes, or its watchdog ends. That is what `dataplane/uring` does in a
thread; here the scheduler decides when.
"""

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Shape:
    """What both ends of a disk have agreed on. pages: of the frontend's pool, at least.

    persistent_max: how many grants the backend keeps mapped, of those that it might. max_pages: how
    many pages to copy through it keeps while nobody uses them.
    """

    abi: Abi
    ring_pages: int = 1
    segments_max: int = MAX_SEGMENTS_PER_REQUEST
    page_grants: int = 1
    pages: int = 352
    persistent: bool = False
    persistent_max: int = 1056
    max_pages: int = 1024

    @property
    def entries(self) -> int:
        """Slots of the ring."""
        return nr_ents(self.ring_pages, self.abi)

    @property
    def offered(self) -> int:
        """The operations that the backend takes, as bits."""
        known = (Op.READ, Op.WRITE, Op.WRITE_BARRIER, Op.FLUSH_DISKCACHE, Op.DISCARD)
        return sum(1 << op for op in known) | bool(self.indirect_max) << Op.INDIRECT

    @property
    def indirect_max(self) -> int:
        """What the backend has published."""
        return self.segments_max if self.segments_max > MAX_SEGMENTS_PER_REQUEST else 0


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

    def __init__(self, machine: EmulatedMachine, clock: Clock, peer: Domid, shape: Shape) -> None:
        super().__init__(clock)
        self.machine = machine
        self.shape = shape
        self.ring = machine.grants.share(peer, shape.ring_pages)
        FrontRing(self.ring.view, shape.entries, shape.abi.number).init()
        needed = FrontQueue.pages_needed(shape.segments_max, shape.page_grants)
        self.pages = machine.grants.share(peer, max(needed, shape.pages))
        self.channel = machine.event_channels.alloc_unbound(peer)
        self.queue = FrontQueue(
            self.ring.view,
            shape.entries,
            shape.abi.number,
            self.pages,
            self.channel,
            segments_max=shape.segments_max,
            page_grants=shape.page_grants,
            persistent=shape.persistent,
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
        shape = frontend.shape
        self.queue = BackendQueue(
            self.mapping.view,
            shape.entries,
            shape.abi.number,
            self.grants,
            self.channel,
            storage,
            capacity=capacity,
            offered=shape.offered,
            indirect_max=shape.indirect_max,
            persistent=shape.persistent,
            persistent_max=shape.persistent_max,
            max_pages=shape.max_pages,
            copying=copying,
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
