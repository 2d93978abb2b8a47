# SPDX-License-Identifier: Apache-2.0
"""What a connected disk holds: for each queue a mapped ring, a bound port, a queue and its thread.

Made in one piece or not at all. While it runs it calls its owner when something is to be told.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from xvd.backend.budget import Lease
from xvd.backend.counters import BackCounters
from xvd.backend.groups import Throttles
from xvd.backend.rest import Rest
from xvd.backend.settings import Settings
from xvd.backend.state import DiskState, Journal
from xvd.blkif.abi import InfoFlag
from xvd.blkif.features import BackendFeatures, offered_operations
from xvd.blkif.nodes import FrontendConfig, QueueConfig
from xvd.dataplane.back.journal import unanswered
from xvd.dataplane.back.options import BackOptions
from xvd.dataplane.back.queue import BackendQueue
from xvd.dataplane.loop.thread import BUDGET, LoopOptions
from xvd.engines.interface import Channel, Engine
from xvd.errors import ConfigError, PeerClosed, PeerProtocolError, XvdError, describe
from xvd.machine.interface import Machine
from xvd.types import RING_SECTOR_SIZE, Domid
from xvd.xenbus.counters import LoopCounters, total
from xvd.xenbus.links import BackLink, Links
from xvd.xenbus.runner import Runtime

WATCHDOG_S: Final = 10.0
"""How long a queue's thread sleeps at most after it has done something, until a lost event is found
out; see `Loop`."""

_LOOK_S: Final = 0.001
"""How often it is looked whether a thread has made a step."""

QUIET_S: Final = 10.0
"""How long failures of the storage are not told again: a guest can cause any number of them."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What all queues of a connection have in common.

    settings: as far as there is room for them. lease: what the connection has taken of the host's
    budget; it gives that back. state: where its journals are. throttles: what limits it. resume:
    the rings are live, and were served by a predecessor.
    """

    machine: Machine
    peer: Domid
    config: FrontendConfig
    features: BackendFeatures
    engine: Engine
    settings: Settings
    lease: Lease
    state: DiskState
    throttles: Throttles = (None, None)
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


def back_options(plan: Plan) -> BackOptions:
    """Return what every queue of a connection is told."""
    features, settings = plan.features, plan.settings
    return BackOptions(
        capacity=features.sectors,
        block_sectors=features.sector_size // RING_SECTOR_SIZE,
        wire_sector=features.wire_sector,
        read_only=bool(features.info & InfoFlag.READONLY),
        offered=offered_operations(features),
        indirect_max=features.max_indirect_segments,
        copying=settings.copying,
        persistent=plan.persistent,
        persistent_max=settings.persistent_grants_of(plan.config.ring_pages),
        persistent_idle_s=settings.persistent_grant_unused_seconds,
        max_pages=settings.max_buffer_pages,
    )


class Connection(Links[BackLink]):
    """One frontend, served, once `serve` was called. Its thread names begin with `name`.

    set_aside: why journals of a predecessor were not taken up, in words; mostly empty. Raises
    `GrantError`, `EventChannelError`, `PeerProtocolError`, `BudgetError`, `ConfigError` or
    OSError, holding nothing.
    """

    def __init__(self, plan: Plan, name: str) -> None:
        super().__init__()
        self.plan = plan
        self.config = plan.config
        self.set_aside = ""
        self._name = name
        self._failures = 0
        self._left = BackCounters()
        """What queues have counted that left their rings to others."""
        self._channels: list[Channel] = []
        self._journals: list[Journal] = []
        self._rest: Rest | None = None
        self._released = asyncio.Event()
        self._on_end: Callable[[Connection], None]
        self._on_failure: Callable[[int, int], None]
        self._on_withdrawn: Callable[[int], None]
        self._on_held: Callable[[int], None]
        try:
            if not plan.resume:
                plan.state.disconnected()
            plan.state.remember(plan.engine.identity)
            for number, nodes in enumerate(plan.config.queues):
                self._open(number, nodes)
        except BaseException:
            self.release()
            raise

    def _open(self, number: int, nodes: QueueConfig) -> None:
        plan = self.plan
        link = BackLink(plan.machine, plan.peer, nodes, plan.config.abi)
        self.links.append(link)
        storage = plan.engine.open_channel()
        self._channels.append(storage)
        link.own(lambda: self._close_channel(number))
        left = self._find_journal(number, link) if plan.resume else None
        journal = left or plan.state.new_journal(number, link.entries)
        self._journals.append(journal)
        self._prepare(number, storage, resume=left is not None)

    def _prepare(self, number: int, storage: Channel, *, resume: bool) -> BackendQueue:
        plan, memory = self.plan, self._journals[number].memory
        queue = self.links[number].prepare(storage, back_options(plan), memory, resume=resume)
        queue.set_hold(plan.settings.holds_errors)
        queue.set_throttles(*plan.throttles)
        return queue

    @property
    def channels(self) -> list[Channel]:
        """Each queue's way into the storage."""
        return self._channels

    def _close_channel(self, number: int) -> None:
        """Close a queue's channel, which may be another one than at the beginning."""
        self._channels[number].close()

    def _find_journal(self, number: int, link: BackLink) -> Journal | None:
        """Return the journal of a predecessor of this ring. Without it a ring can be served on if
        all that is on it was answered; `PeerProtocolError` if not."""
        reason, ring = "a backend that left no journal", link.ring.view
        found: Journal | None = None
        try:
            found = self.plan.state.find_journal(number, ring, link.entries, link.abi.number)
        except ConfigError as error:
            self.set_aside = "; ".join(filter(None, (self.set_aside, str(error))))
            reason = f"its predecessor ({error})"
        if found is None and unanswered(ring):
            raise PeerProtocolError(
                f"its ring holds requests of {reason}: what was answered cannot be known; the "
                "frontend has to reconnect"
            )
        return found

    # ---- While it runs ----

    def serve(
        self,
        runtime: Runtime,
        *,
        on_end: Callable[["Connection"], None],
        on_failure: Callable[[int, int], None],
        on_withdrawn: Callable[[int], None],
        on_held: Callable[[int], None],
    ) -> None:
        """Run the queues until `end`, or until one of the rings is broken.

        Raises OSError if no thread can be had, with everything given back. on_end: called once
        when no queue runs any more, before everything is given back. on_failure: with the errno of
        one of the storage's last failures, and how many there were. on_withdrawn: with the
        operations that the storage turned out not to do, as bits. on_held: with the errno after
        which a queue is held.
        """
        self._on_end, self._on_failure = on_end, on_failure
        self._on_withdrawn, self._on_held = on_withdrawn, on_held
        options = LoopOptions(
            poll_s=self.plan.settings.poll_s,
            holdoff_s=self.plan.settings.holdoff_s,
            watchdog_s=WATCHDOG_S,
            budget=self.plan.budget,
        )
        queues = [link.queue for link in self.links]
        try:
            self.start(queues, self._name, runtime, options, self._all_ended)
        except BaseException:
            self.release()
            raise
        if self.plan.resume:
            for link in self.links:  # a predecessor's responses may lie there unannounced
                link.channel.notify()
        self._listen()

    async def end(self) -> None:
        """Finish what is in flight and give everything back."""
        self.drain()
        await self._released.wait()

    # ---- At rest ----

    def halt(self) -> None:
        """Take no requests from now on, whatever becomes of those taken."""
        for link in self.links:
            link.queue.pause()

    async def pause(self) -> None:
        """Take no more requests; return when none is in flight on any queue.

        Raises `PeerClosed` if the connection ends before that. Cancelling leaves it paused.
        """
        rest = self._resting()
        while True:
            rested = rest.begin()
            for link in self.links:
                link.queue.pause(rest.fd)
            self.wake_all()
            await rested
            if all(link.queue.quiet for link in self.links):
                return  # and not of an earlier pause, which was given up

    @property
    def rests(self) -> bool:
        """Whether `pause` has come to its end, and it was not resumed since."""
        return self._rest is not None and all(link.queue.quiet for link in self.links)

    def _resting(self) -> Rest:
        if self._rest is None:
            self._rest = Rest(len(self.links))
        return self._rest

    def resume(self) -> None:
        """Take requests again."""
        for link in self.links:
            link.queue.resume()
        self.wake_all()

    @property
    def held(self) -> bool:
        """Whether a queue takes nothing because the storage was away."""
        return any(link.queue.held for link in self.links)

    def open_channels(self, engine: Engine) -> list[Channel]:
        """Open a channel for each queue, or none. Raises what the engine raises."""
        with contextlib.ExitStack() as undo:
            channels = []
            for _ in self.links:
                channels.append(engine.open_channel())
                undo.callback(channels[-1].close)
            undo.pop_all()
        return channels

    async def exchange(self, engine: Engine, channels: list[Channel]) -> None:
        """Go on with other storage, by these channels to it. Only when paused and at rest; not to
        be cancelled."""
        assert self._rest is not None
        rested = self._rest.begin()
        before, self._channels = self._channels, channels
        for link, channel in zip(self.links, channels, strict=True):
            link.queue.exchange(channel)
        self.plan = replace(self.plan, engine=engine)
        self.wake_all()
        with contextlib.suppress(PeerClosed):  # then nobody uses the old ones either
            await rested
        for channel in before:
            channel.close()

    # ---- Leaving storage that hangs ----

    async def check_leaves(self, timeout_s: float) -> None:
        """See that `leave` can do its part, of a connection that is paused but not at rest.

        Raises `ConfigError` where a thread is within its storage, or that can still reach pages of
        the guest's.
        """
        seen = [(link, link.queue.counters()["steps"]) for link in self.links]
        self.wake_all()
        try:
            async with asyncio.timeout(timeout_s):
                await _until(lambda: all(_has_stepped(link, steps) for link, steps in seen))
        except TimeoutError:
            raise ConfigError("a thread of it is within its storage and cannot leave") from None
        if self.plan.engine.info.pins_pages and any(link.queue.is_pinned for link in self.links):
            raise ConfigError(
                "reads of it by direct I/O still reach pages of the guest's, which nobody can take "
                "back; a backend with --copy has none"
            )

    async def leave(self, engine: Engine, channels: list[Channel]) -> "asyncio.Future[None]":
        """Go on with other storage, by these channels, and leave the old one what it has. What
        comes back is done when that has ended all, if it ever does. Not to be cancelled."""
        gone = [self.leaves(link.queue) for link in self.links]
        for link in self.links:
            link.queue.leave()
        self.wake_all()
        await _until(lambda: all(link.has_left or not link.runner for link in self.links))
        if not self.links:  # the guest has left the disk, and all is given back
            for channel in channels:
                channel.close()
            return asyncio.ensure_future(_when_gone(gone, []))
        before, self._channels = self._channels, channels
        self.plan = replace(self.plan, engine=engine)
        self._succeed_all()
        return asyncio.ensure_future(_when_gone(gone, before))

    def _succeed_all(self) -> None:
        """Begin the queues that take up what the others have left."""
        if not all(link.has_left for link in self.links):
            self.end_left()  # a ring was broken meanwhile
            return
        self._mute()
        self._failures = 0
        for number, link in enumerate(self.links):
            self._left += BackCounters.of(link.queue.counters()).over()
            try:
                self._prepare(number, self._channels[number], resume=True).pause()
                self.succeed(number, link.queue)
            except (OSError, MemoryError, XvdError) as error:
                self.end_left(describe(error))
                return
        self._listen()

    def _all_ended(self) -> None:
        """The queues are drained, or a ring is broken: give everything back at once."""
        self._mute()
        if self._rest is not None:
            self._rest.fail(PeerClosed("the connection has ended"))
        self._on_end(self)
        self.release()

    def apply(self, settings: Settings) -> None:
        """Change what can be changed under a frontend's hands: what is kept, and for how long."""
        grants_max = settings.persistent_grants_of(self.config.ring_pages)
        for link in self.links:
            link.queue.set_persistent(grants_max, settings.persistent_grant_unused_seconds)
            link.queue.set_max_pages(settings.max_buffer_pages)
            link.queue.set_hold(settings.holds_errors)
        self.wake_all()

    def limit(self, throttles: Throttles) -> None:
        """Go by these limits, which may have changed, from the next request on."""
        for link in self.links:
            link.queue.set_throttles(*throttles)
        self.wake_all()

    def squeeze(self, seconds: float) -> None:
        """Keep no memory that is not in use, for so long."""
        for link in self.links:
            link.queue.squeeze(seconds)
        self.wake_all()

    def set_capacity(self, sectors: int) -> None:
        """Set where the disk ends, from the next request on."""
        for link in self.links:
            link.queue.set_capacity(sectors)

    @property
    def mode(self) -> str:
        """How data is moved: "grant copy", "mapping" (for each request) or "persistent grants"."""
        if self.links[0].queue.copying:
            return "grant copy"
        return "persistent grants" if self.plan.persistent else "mapping"

    # ---- Alarms ----

    def _listen(self) -> None:
        """Hear of failures of the storage, and of what it turns out not to do, on any queue."""
        events = asyncio.get_running_loop()
        for link in self.links:
            events.add_reader(link.queue.alarm_fd, self._alarmed)

    def _mute(self) -> None:
        events = asyncio.get_running_loop()
        for link in self.links:
            events.remove_reader(link.queue.alarm_fd)

    def _alarmed(self) -> None:
        """The storage failed, or cannot do something: a queue's thread rang."""
        failed = [link.queue.failure() for link in self.links]  # the alarms are set again
        if withdrawn := self._withdrawn():
            self._on_withdrawn(withdrawn)
        if self.held:
            self._on_held(max(number for number, _ in failed))
        failures = sum(count for _, count in failed)
        if failures > self._failures:
            self._failures = failures
            self._mute()
            asyncio.get_running_loop().call_later(QUIET_S, self._listen)
            self._on_failure(max(number for number, _ in failed), failures)

    def _withdrawn(self) -> int:
        """Return what the storage turned out not to do, on all queues once one of them knows."""
        bits = 0
        for link in self.links:
            bits |= link.queue.withdrawn
        for link in self.links:
            link.queue.withdraw(bits)
        return bits

    # ---- Figures, and the end ----

    def counters(self) -> BackCounters:
        """Add the counters up over the queues."""
        now = (BackCounters.of(link.queue.counters()) for link in self.links)
        return total(BackCounters, (self._left, *now))

    def loop_counters(self) -> LoopCounters:
        """How often the threads slept and were woken, added over the queues."""
        runners = [link.runner for link in self.links if link.runner is not None]
        return total(LoopCounters, (LoopCounters.of(one.counters()) for one in runners))

    def release(self) -> None:
        """Unmap and unbind; only after the threads have ended. Idempotent."""
        super().release()
        if self._rest is not None:
            self._rest.close()
        self.plan.lease.close()
        self._released.set()


def _has_stepped(link: BackLink, steps: object) -> bool:
    """Whether a queue has made a step since it had made so many, or runs no more."""
    return link.runner is None or link.queue.counters()["steps"] != steps


async def _until(condition: Callable[[], bool]) -> None:
    """Wait for threads that have been woken: a millisecond at a time."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(_LOOK_S)


async def _when_gone(gone: "list[asyncio.Future[None]]", channels: list[Channel]) -> None:
    """Wait for queues that have left their rings, and close the channels that they had."""
    for one in gone:
        await one
    for channel in channels:
        channel.close()
