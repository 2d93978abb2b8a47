# SPDX-License-Identifier: Apache-2.0
"""The two ends of a simulated disk: the shipped queues, with a sleep that the scheduler can see.

A queue that has found nothing to do, and has asked for an event, sleeps until its event is
delivered, something completes, or its watchdog ends. That is what `dataplane/loop/loop` does in a
thread of each queue's own; here the scheduler decides when, for each of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from xvd.blkif.abi import MAX_SEGMENTS_PER_REQUEST, Abi, nr_ents
from xvd.blkif.features import BackendFeatures, offered_operations, useful_indirect
from xvd.dataplane.back.journal import journal_fault
from xvd.dataplane.back.options import BackOptions
from xvd.dataplane.front.options import FrontOptions
from xvd.dataplane.front.queue import FrontQueue
from xvd.dataplane.types import StepFlag
from xvd.machine.emulated.machine import EmulatedMachine
from xvd.machine.interface import EventChannel
from xvd.sim.clock import Clock
from xvd.sim.storage import SimStorage
from xvd.types import Domid
from xvd.xenbus.links import BackLink, FrontLink

WATCHDOG_NS = 5_000_000_000


@dataclass(frozen=True, slots=True)
class Shape:
    """What both ends of a disk have agreed on. pages: of each queue's pool, at least.

    persistent_max: how many grants the backend keeps mapped for a queue, of those that it might.
    max_pages: how many pages to copy through it keeps while nobody uses them. flush, barrier,
    discard: whether the backend offers them.
    """

    abi: Abi
    queues: int = 1
    ring_pages: int = 1
    segments_max: int = MAX_SEGMENTS_PER_REQUEST
    page_grants: int = 1
    pages: int = 352
    persistent: bool = False
    persistent_max: int = 1056
    max_pages: int = 1024
    flush: bool = True
    barrier: bool = True
    discard: bool = True

    @property
    def entries(self) -> int:
        """Slots of one ring."""
        return nr_ents(self.ring_pages, self.abi)

    @property
    def offered(self) -> int:
        """The operations that the backend takes, as bits."""
        return offered_operations(
            BackendFeatures(
                sectors=0,
                flush=self.flush,
                barrier=self.barrier,
                discard=self.discard,
                max_indirect_segments=self.indirect_max,
            )
        )

    @property
    def indirect_max(self) -> int:
        """The segments that the backend has published."""
        return useful_indirect(self.segments_max)

    @property
    def front_options(self) -> FrontOptions:
        """Return what each of the frontend's queues is told."""
        return FrontOptions(
            segments_max=self.segments_max,
            page_grants=self.page_grants,
            persistent=self.persistent,
        )

    def back_options(self, capacity: int, *, copying: bool) -> BackOptions:
        """Return what each of the backend's queues is told, for a disk of so many sectors."""
        return BackOptions(
            capacity=capacity,
            offered=self.offered,
            indirect_max=self.indirect_max,
            persistent=self.persistent,
            persistent_max=self.persistent_max,
            max_pages=self.max_pages,
            copying=copying,
        )


class SimLink(ABC):
    """A link of either end: asleep or awake, and the event that is under way to it."""

    channel: EventChannel

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.awake = True
        self.drained = False
        self.deadline_ns = 0

    def wake(self) -> None:
        """End the sleep."""
        self.awake = True

    @abstractmethod
    def step(self, budget: int) -> int:
        """Make one step, then sleep if there is nothing to do; STEP_* flags."""

    def _rest(self, flags: int, may_sleep: bool) -> int:
        self.drained = bool(flags & StepFlag.DRAINED)
        self.awake = bool(flags & StepFlag.WORKED) or not may_sleep
        if not self.awake:
            self.deadline_ns = self._clock.now_ns + WATCHDOG_NS
        return flags


class SimFrontLink(SimLink):
    """A ring of the frontend's, with its pages, its event channel and its queue."""

    def __init__(self, machine: EmulatedMachine, clock: Clock, peer: Domid, shape: Shape) -> None:
        super().__init__(clock)
        self.link = FrontLink(machine, peer, shape.ring_pages, shape.abi)
        self.channel = self.link.channel
        needed = FrontQueue.pages_needed(shape.segments_max, shape.page_grants)
        pages = machine.grants.share(peer, max(needed, shape.pages))
        self.queue = self.link.prepare(pages, shape.front_options)

    def step(self, budget: int) -> int:
        """See `SimLink.step`."""
        return self._rest(self.queue.step(budget), self.queue.may_sleep())


class SimBackLink(SimLink):
    """A ring that the backend has mapped, with an event channel and a queue.

    A predecessor's journal is taken up if it is of this ring.
    """

    def __init__(
        self,
        link: BackLink,
        clock: Clock,
        storage: SimStorage,
        options: BackOptions,
        journal: bytearray,
    ) -> None:
        super().__init__(clock)
        self.link = link
        self.channel = link.channel
        fault = journal_fault(journal, link.ring.view, link.entries, link.abi.number)
        self.queue = link.prepare(storage.open_channel(), options, journal, resume=not fault)
        self.channel.notify()

    def step(self, budget: int) -> int:
        """See `SimLink.step`."""
        self.queue.set_time(self._clock.now_ns)
        flags = self._rest(self.queue.step(budget), self.queue.may_sleep())
        if self.queue.due_ns and not self.awake:
            self.deadline_ns = min(self.deadline_ns, self.queue.due_ns)
        return flags


class SimFrontend:
    """A frontend process with its queues, in a session of its own."""

    def __init__(self, machine: EmulatedMachine, clock: Clock, peer: Domid, shape: Shape) -> None:
        self.machine = machine
        self.shape = shape
        self.links = [SimFrontLink(machine, clock, peer, shape) for _ in range(shape.queues)]

    def wake(self) -> None:
        """Wake every queue."""
        for link in self.links:
            link.wake()

    def die(self) -> None:
        """End as by SIGKILL: the session is closed; pages that are mapped are freed later."""
        self.machine.close()


class SimBackend:
    """A backend process that serves all queues of a frontend, in a session of its own.

    journals: one for each queue.
    """

    def __init__(
        self,
        machine: EmulatedMachine,
        clock: Clock,
        frontend: SimFrontend,
        storage: SimStorage,
        *,
        copying: bool,
        journals: Sequence[bytearray],
    ) -> None:
        self.machine = machine
        shape, peer = frontend.shape, frontend.machine.domid
        options = shape.back_options(storage.sectors, copying=copying)
        self.links = [
            SimBackLink(
                BackLink(machine, peer, other.link.nodes, shape.abi),
                clock,
                storage,
                options,
                journal,
            )
            for other, journal in zip(frontend.links, journals, strict=True)
        ]

    @property
    def drained(self) -> bool:
        """Whether every queue has finished what it took, and takes no more."""
        return all(link.drained for link in self.links)

    def wake(self) -> None:
        """Wake every queue."""
        for link in self.links:
            link.wake()

    def stop(self) -> None:
        """Take nothing more, on any queue."""
        for link in self.links:
            link.queue.stop()
        self.wake()

    def set_capacity(self, sectors: int) -> None:
        """Set where the disk ends, from the next request on."""
        for link in self.links:
            link.queue.set_capacity(sectors)

    def release(self) -> None:
        """Give everything back, as a backend that has drained does."""
        for link in self.links:
            link.link.release()
        self.machine.close()

    def die(self) -> None:
        """End as by SIGKILL: nothing more is answered, the system takes the mappings away."""
        for link in self.links:
            link.queue.abandon()
        self.release()
