# SPDX-License-Identifier: Apache-2.0
"""What a connected disk holds: for each queue a mapped ring, a bound port, a queue and its thread.

Made in one piece or not at all, and given back in the opposite order. The queues share the storage
and nothing else; each has a thread, a journal and counters of its own (Linux 2fb1ef4f, d4bf0065).
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from xvd.backend.budget import Lease
from xvd.backend.counters import merge_counters
from xvd.backend.features import offered_operations
from xvd.backend.journal import Journal
from xvd.backend.settings import Settings
from xvd.backend.state import DiskState
from xvd.blkif.abi import InfoFlag, nr_ents
from xvd.blkif.nodes import BackendFeatures, FrontendConfig, QueueConfig
from xvd.dataplane.back.journal import unanswered
from xvd.dataplane.back.queue import BackendQueue
from xvd.dataplane.loop.thread import BUDGET, QueueThread
from xvd.engines.interface import Engine
from xvd.errors import ConfigError, PeerProtocolError
from xvd.machine.interface import Machine
from xvd.types import RING_SECTOR_SIZE, Domid

WATCHDOG_S: Final = 60.0
"""How long a queue's thread sleeps at most.

Short of storage that does not say that it has finished, what a thread has missed is found sooner,
and for less, by `Connection.wake_overdue`."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What all queues of a connection have in common.

    settings: as far as there is room for them. lease: what the connection has taken of the host's
    budget; it gives that back. state: where its journals are. resume: the rings are live, and were
    served by a predecessor.
    """

    machine: Machine
    peer: Domid
    config: FrontendConfig
    features: BackendFeatures
    engine: Engine
    settings: Settings
    lease: Lease
    state: DiskState
    resume: bool = False

    @property
    def persistent(self) -> bool:
        """Whether grants stay mapped: when both ends have said so, and then still as we like."""
        offered = self.config.persistent and self.features.persistent
        return offered and not self.settings.copying

    @property
    def budget(self) -> int:
        """Requests of one step: many where each step maps or copies their grants by one call."""
        return BUDGET if self.persistent else 64


class Link:
    """One queue of a connection, without its thread.

    set_aside: why a predecessor's journal was not taken up, in words; mostly empty.
    """

    def __init__(self, plan: Plan, nodes: QueueConfig, number: int, name: str) -> None:
        self._undo: list[Callable[[], None]] = []
        self.name = name
        self.set_aside = ""
        self.thread: QueueThread | None = None
        try:
            self.queue = self._build(plan, nodes, number)
            self._undo.append(self.queue.release)
        except BaseException:
            self.release()
            raise

    def _build(self, plan: Plan, nodes: QueueConfig, number: int) -> BackendQueue:
        grants = plan.machine.grants.foreign(plan.peer)
        self._undo.append(grants.close)
        ring = grants.map(nodes.ring_refs)
        self._undo.append(ring.close)
        channels = plan.machine.event_channels
        self.channel = channels.bind_interdomain(plan.peer, nodes.event_channel)
        self._undo.append(self.channel.close)
        storage = plan.engine.open_channel()
        self._undo.append(storage.close)
        config, features, settings = plan.config, plan.features, plan.settings
        entries = nr_ents(config.ring_pages, config.abi)
        left = self._find_journal(plan, number, ring.view, entries) if plan.resume else None
        self._journal = left or plan.state.new_journal(number, entries)
        return BackendQueue(
            ring.view,
            entries,
            config.abi.number,
            grants,
            self.channel,
            storage,
            capacity=features.sectors,
            logical_sectors=features.sector_size // RING_SECTOR_SIZE,
            unit=features.unit,
            read_only=bool(plan.features.info & InfoFlag.READONLY),
            offered=offered_operations(features),
            indirect_max=features.max_indirect_segments,
            copying=settings.copying,
            persistent=plan.persistent,
            persistent_max=settings.persistent_grants_of(config.ring_pages),
            persistent_idle_s=settings.persistent_grant_unused_seconds,
            max_pages=settings.max_buffer_pages,
            journal=self._journal.memory,
            resume=left is not None,
        )

    def _find_journal(
        self, plan: Plan, number: int, ring: memoryview, entries: int
    ) -> Journal | None:
        """What a predecessor left for this ring. Without it a ring can be served on if all that is
        on it was answered; `PeerProtocolError` if not."""
        reason = "a backend that left no journal"
        try:
            found = plan.state.find_journal(number, ring, entries, plan.config.abi.number)
        except ConfigError as error:
            found, self.set_aside = None, str(error)
            reason = f"its predecessor ({error})"
        if found is None and unanswered(ring):
            raise PeerProtocolError(
                f"its ring holds requests of {reason}: what was answered cannot be known; the "
                "frontend has to reconnect"
            )
        return found

    def release(self) -> None:
        """Unmap and unbind; only after the thread has ended."""
        while self._undo:
            self._undo.pop()()


class Connection:
    """One frontend, served, once `start` was called. Its thread names begin with `name`.

    Raises `GrantError`, `EventChannelError`, `PeerProtocolError`, `BudgetError`, `ConfigError` or
    OSError, holding nothing.
    """

    def __init__(self, plan: Plan, name: str) -> None:
        self.plan = plan
        self.config = plan.config
        self.links: list[Link] = []
        self._failure: Exception | None = None
        self._on_exit: Callable[[Exception | None], None] = _tell_nobody
        several = len(plan.config.queues) > 1
        try:
            if not plan.resume:
                plan.state.disconnected()
            plan.state.remember(plan.engine.identity)
            for number, nodes in enumerate(plan.config.queues):
                link_name = f"{name}-{number}" if several else name
                self.links.append(Link(plan, nodes, number, link_name))
        except BaseException:
            self.release()
            raise

    # ---- Threads ----

    def start(self, on_exit: Callable[[Exception | None], None]) -> None:
        """Serve. `on_exit` is called when every thread has ended, with what ended the first.

        A queue that breaks takes the others with it: a disk of which a part hangs is of no use.
        Raises OSError if no thread can be had, and then none runs.
        """
        self._on_exit = on_exit
        wanted = self.plan.settings.poll_us
        poll_us = self.plan.machine.poll_us if wanted is None else wanted
        for link in self.links:
            try:
                link.thread = QueueThread(
                    link.queue, link.name, self._ends(link), poll_s=poll_us / 1e6,
                    watchdog_s=WATCHDOG_S, budget=self.plan.budget,
                )  # fmt: skip
            except OSError as error:
                if link is self.links[0]:
                    raise
                self._failure = error
                self.drain()
                return

    def _ends(self, link: Link) -> Callable[[Exception | None], None]:
        def ended(failure: Exception | None) -> None:
            link.thread = None
            self._failure = self._failure or failure
            if not any(other.thread for other in self.links):
                self._on_exit(self._failure)
            elif failure is not None or link.queue.broken:
                self.drain()

        return ended

    def drain(self) -> None:
        """Finish what is in flight on every ring and nothing more; ends in `on_exit`."""
        for link in self.links:
            if link.thread is not None:
                link.thread.drain()

    def apply(self, settings: Settings) -> None:
        """Change what can be changed under a frontend's hands: what is kept, and for how long."""
        grants_max = settings.persistent_grants_of(self.config.ring_pages)
        for link in self.links:
            link.queue.set_persistent(grants_max, settings.persistent_grant_unused_seconds)
            link.queue.set_max_pages(settings.max_buffer_pages)
            if link.thread is not None:
                link.thread.wake()

    def squeeze(self, seconds: float) -> None:
        """Keep no memory that is not in use, for so long."""
        for link in self.links:
            link.queue.squeeze(seconds)
            if link.thread is not None:
                link.thread.wake()

    def wake_overdue(self) -> None:
        """Wake the threads that sleep though there is something to do: an event was lost, say."""
        for link in self.links:
            if link.thread is not None and link.queue.overdue:
                link.thread.wake()

    def set_capacity(self, sectors: int) -> None:
        """What is out of range from the next request on."""
        for link in self.links:
            link.queue.set_capacity(sectors)

    def kick(self) -> None:
        """An event on each ring: responses of a predecessor may lie there unannounced."""
        for link in self.links:
            link.channel.notify()

    @property
    def mode(self) -> str:
        """How data is moved: "grant copy", "mapping" (for each request) or "persistent grants"."""
        if self.links[0].queue.copying:
            return "grant copy"
        return "persistent grants" if self.plan.persistent else "mapping"

    @property
    def set_aside(self) -> str:
        """Why journals of a predecessor were not taken up, in words; mostly empty."""
        return "; ".join(link.set_aside for link in self.links if link.set_aside)

    @property
    def broken(self) -> bool:
        """Whether the frontend broke one of its rings."""
        return any(link.queue.broken for link in self.links)

    # ---- Alarms ----

    def listen(self, on_alarm: Callable[[], None]) -> None:
        """Call it when storage fails, or `withdrawn` changes, on any queue."""
        events = asyncio.get_running_loop()
        for link in self.links:
            events.add_reader(link.queue.alarm_fd, on_alarm)

    def mute(self) -> None:
        """Call nobody."""
        events = asyncio.get_running_loop()
        for link in self.links:
            events.remove_reader(link.queue.alarm_fd)

    def failure(self) -> tuple[int, int]:
        """(errno of one of the last failures, failures so far); the alarms are set again."""
        failures = [link.queue.failure() for link in self.links]
        return max(number for number, _ in failures), sum(count for _, count in failures)

    def withdrawn(self) -> int:
        """What the storage turned out not to do, on all queues once one of them knows."""
        bits = 0
        for link in self.links:
            bits |= link.queue.withdrawn
        for link in self.links:
            link.queue.withdraw(bits)
        return bits

    # ---- Figures, and the end ----

    def counters(self) -> dict[str, object]:
        """Everything counted, added over the queues."""
        total: dict[str, object] = {}
        for link in self.links:
            total = merge_counters(total, link.queue.counters())
        return total

    def loop_counters(self) -> dict[str, object]:
        """How often the threads slept and were woken, added over the queues."""
        total: dict[str, object] = {}
        for link in self.links:
            if link.thread is not None:
                total = merge_counters(total, dict(link.thread.loop.counters()))
        return total

    def release(self) -> None:
        """Unmap and unbind; only after the threads have ended."""
        for link in reversed(self.links):
            link.release()
        self.plan.lease.close()
        # Who is told knows us: without this our descriptors would wait for the collector.
        self._on_exit = _tell_nobody


def _tell_nobody(_failure: Exception | None) -> None:
    """Nobody waits for the end."""
