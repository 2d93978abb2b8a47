# SPDX-License-Identifier: Apache-2.0
"""What a frontend has with one backend: its queues, each with a ring, a port, pages and a thread.

It comes about in two steps, as a backend says what it can in two: rings and ports are there before
they are published, data pages and queues when the backend is connected. Either step is made whole
or not at all; where a budget is too small for what was wanted, less is taken.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final

from xvd.blkif.abi import MAX_SEGMENTS_PER_REQUEST, Abi, nr_ents
from xvd.blkif.nodes import BackendFeatures, FrontendConfig, QueueConfig
from xvd.dataplane.front.queue import FrontQueue
from xvd.dataplane.loop.thread import Queue, QueueThread
from xvd.dataplane.ring.ring import FrontRing
from xvd.errors import EventChannelError, GrantError, PeerProtocolError, XenstoreError
from xvd.frontend.settings import Settings
from xvd.frontend.statistics import Statistics
from xvd.machine.interface import EventChannel, Machine, SharedPages
from xvd.types import PAGE_SIZE, RING_SECTOR_SIZE, Domid

SCAN_S = 10.0
"""How often to search for grants that the backend has dropped (Linux 4b422cb9)."""

_QUOTA: Final = ("ENOSPC", "EQUOTA", "E2BIG")
"""What a store says that has no room for our nodes: a frontend of many queues writes hundreds."""

Stepper = Callable[[Sequence[FrontQueue]], Sequence[Queue]]
"""Puts something that steps the queues, a load, in the place of each."""


def smaller(queues: int, ring_page_order: int) -> tuple[int, int] | None:
    """The next smaller number and size of rings to try; None below a single page."""
    if queues > 1:
        return queues // 2, ring_page_order
    return (1, ring_page_order - 1) if ring_page_order else None


async def published(
    connect: Callable[[int, int], "Connection"],
    publish: Callable[[FrontendConfig], Awaitable[None]],
    queues: int,
    ring_page_order: int,
    log: logging.LoggerAdapter[logging.Logger],
) -> "Connection":
    """A connection whose nodes are in the store; smaller than wanted where that is short of room.

    Raises what `connect` and `publish` do, holding nothing.
    """
    while True:
        connection = connect(queues, ring_page_order)
        try:
            await publish(connection.config)
        except XenstoreError as error:
            connection.release()
            less = smaller(*connection.size)
            if error.code not in _QUOTA or less is None:
                raise
            log.info("%s: fewer queues or smaller rings", error)
            queues, ring_page_order = less
        except BaseException:
            connection.release()
            raise
        else:
            return connection


class Connection:
    """Our side of one connection. `on_exit` is called once, when the last thread has ended.

    queues, ring_page_order: how many and how large, as offered. A machine that has no room for them
    gets fewer, then smaller ones; raises `GrantError` or `EventChannelError`, holding nothing, when
    it has none for a single page.
    """

    def __init__(
        self,
        machine: Machine,
        peer: Domid,
        *,
        abi: Abi,
        handle: int,
        name: str,
        queues: int,
        ring_page_order: int,
        settings: Settings,
        trusted: bool,
        on_exit: Callable[[], None],
    ) -> None:
        self._machine = machine
        self._peer = peer
        self._handle = handle & 0xFFFF
        self._name = name
        self._settings = settings
        self._trusted = trusted
        self._on_exit = on_exit
        self._undo: list[Callable[[], None]] = []
        self._rings: list[tuple[SharedPages, EventChannel]] = []
        self._threads: list[QueueThread] = []
        self._to_wake: list[QueueThread] = []
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._scanner: asyncio.TimerHandle | None = None
        self._turn = 0
        self._ends: list[int] = []
        self.queues: list[FrontQueue] = []
        self.failure: str | None = None
        self.persistent = False
        self._take_rings(abi, queues, ring_page_order)
        published = (QueueConfig(tuple(ring.grefs), channel.port) for ring, channel in self._rings)
        self.config = FrontendConfig(
            abi, tuple(published), settings.feature_persistent, settings.large_sectors
        )

    # ---- Coming about ----

    def _take_rings(self, abi: Abi, queues: int, order: int) -> None:
        try:
            for _ in range(queues):
                ring = self._machine.grants.share(self._peer, 1 << order)
                self._undo.append(ring.close)
                FrontRing(ring.view, nr_ents(1 << order, abi), abi.number).init()
                channel = self._machine.event_channels.alloc_unbound(self._peer)
                self._undo.append(channel.close)
                self._rings.append((ring, channel))
        except (GrantError, EventChannelError):
            self.release()
            less = smaller(queues, order)
            if less is None:
                raise
            self._take_rings(abi, *less)
        except BaseException:
            self.release()
            raise

    @property
    def size(self) -> tuple[int, int]:
        """(queues, ring page order) that were to be had."""
        return len(self.config.queues), self.config.ring_pages.bit_length() - 1

    def prepare(self, features: BackendFeatures) -> None:
        """Take the data pages and make the queues, by what the connected backend offers.

        Raises `GrantError` when there is no room for even one request of 11 pages in each queue,
        `PeerProtocolError` when a block fits no request; `release` is due in any case.
        """
        abi = self.config.abi
        entries = nr_ents(self.config.ring_pages, abi)
        segments = self._settings.segments(features)
        self.persistent = features.persistent and self._settings.feature_persistent
        pools, segments = self._take_pools(entries, segments)
        if features.sector_size > segments * PAGE_SIZE:
            raise PeerProtocolError(
                f"the backend's blocks have {features.sector_size} bytes, and a request at most "
                f"{segments * PAGE_SIZE}"
            )
        for (ring, channel), pages in zip(self._rings, pools, strict=True):
            self.queues.append(
                FrontQueue(
                    ring.view, entries, abi.number, pages, channel, handle=self._handle,
                    segments_max=segments, persistent=self.persistent, trusted=self._trusted,
                    page_grants=self._settings.page_size // PAGE_SIZE,
                    block_sectors=features.sector_size // RING_SECTOR_SIZE,
                    wire_sector=features.unit,
                )
            )  # fmt: skip
        self._ends = [-1] * len(self.queues)

    def _take_pools(self, entries: int, segments: int) -> tuple[list[SharedPages], int]:
        """Pages for each queue, and the segments of a request that they are enough for."""
        grants = self._settings.page_size // PAGE_SIZE
        request = FrontQueue.pages_needed(segments, grants)
        size = max(request, min(entries * request, self._settings.pool_pages // grants * grants))
        while size >= request:
            taken: list[SharedPages] = []
            try:
                for _ in self._rings:
                    taken.append(self._machine.grants.share(self._peer, size))
            except GrantError:
                for pages in taken:
                    pages.close()
                if size == request and segments == MAX_SEGMENTS_PER_REQUEST:
                    raise
                size = max(request, size // 2 // grants * grants) if size > request else 0
            else:
                self._undo += [pages.close for pages in taken]
                return taken, segments
        return self._take_pools(entries, MAX_SEGMENTS_PER_REQUEST)

    # ---- Running ----

    def start(self, stepper: Stepper | None = None) -> None:
        """Let the queues run. Raises OSError if a thread cannot be had; `end` is due then."""
        steppers = stepper(self.queues) if stepper is not None else self.queues
        wanted = self._settings.poll_us
        poll_us = self._machine.poll_us if wanted is None else wanted
        try:
            for number, queue in enumerate(steppers):
                ended = partial(self._ended, self.queues[number])
                name = f"{self._name}-{number}" if len(self.queues) > 1 else self._name
                self._threads.append(QueueThread(queue, name, ended, poll_s=poll_us / 1e6))
                self._running += 1
                self._idle.clear()
        except BaseException:
            self._on_exit = _nothing
            self.abandon()
            raise
        if self.persistent:
            self._scan_later()

    def _scan_later(self) -> None:
        self._scanner = asyncio.get_running_loop().call_later(SCAN_S, self._scan)

    def _scan(self) -> None:
        for queue, thread in zip(self.queues, self._threads, strict=False):
            queue.scan()
            thread.wake()
        self._scan_later()

    def _ended(self, queue: FrontQueue, failure: Exception | None) -> None:
        """A thread has returned: drained, abandoned, or broken; then the rest has to go too."""
        self._running -= 1
        if queue.breach is not None or failure is not None:
            self.failure = self.failure or queue.breach or str(failure)
            self.abandon()
        if self._running == 0:
            self._stop_scanning()
            self._idle.set()
            self._on_exit()

    def _stop_scanning(self) -> None:
        if self._scanner is not None:
            self._scanner.cancel()
            self._scanner = None

    @property
    def running(self) -> bool:
        """Whether a thread is still at work."""
        return self._running > 0

    def drain(self) -> None:
        """Finish what is on the rings and nothing more; ends in `on_exit`."""
        for thread in self._threads:
            thread.drain()

    def abandon(self) -> None:
        """Leave at once, whatever is in flight; ends in `on_exit`."""
        for thread in self._threads:
            thread.abandon()

    async def end(self) -> None:
        """Abandon, wait for the threads, release."""
        self.abandon()
        await self._idle.wait()
        self.release()

    def release(self) -> None:
        """End the grants, free the ports; only when nothing runs.

        Pages that the backend still maps are freed when it unmaps them, and not reused before.
        """
        self._stop_scanning()
        while self._undo:
            self._undo.pop()()
        # Each thread knows us: without this its descriptors would wait for the collector.
        self._rings.clear()
        self._threads.clear()
        self._to_wake.clear()
        self.queues.clear()

    # ---- Use ----

    def submit(
        self,
        operation: int,
        sector_number: int,
        nr_sectors: int,
        buffer: bytes | bytearray | memoryview | None,
        token: int,
        *,
        flag: int = 0,
    ) -> None:
        """Queue an operation on one of the queues: see `FrontQueue.submit`.

        What goes on where a queue's last operation ended goes to that queue, which can join the
        two; everything else goes round.
        """
        number = self._choose(sector_number)
        self._ends[number] = sector_number + nr_sectors
        queue = self.queues[number]
        if queue.submit(operation, sector_number, nr_sectors, buffer, token, flag=flag):
            if not self._to_wake:
                asyncio.get_running_loop().call_soon(self._wake)
            self._to_wake.append(self._threads[number])

    def _wake(self) -> None:
        """Submit all of one round of the event loop at once, so that neighbours are joined."""
        for thread in self._to_wake:
            thread.wake()
        self._to_wake.clear()

    def wake(self, number: int) -> None:
        """Let the thread of a queue step now."""
        self._threads[number].wake()

    @property
    def barrier_sectors_max(self) -> int:
        """Sectors of the largest barrier: it cannot be split."""
        return self.queues[0].barrier_sectors_max

    def _choose(self, sector_number: int) -> int:
        if len(self.queues) == 1:
            return 0
        if sector_number in self._ends:
            return self._ends.index(sector_number)
        self._turn = (self._turn + 1) % len(self.queues)
        return self._turn

    def statistics(self) -> Statistics:
        """The figures of each queue."""
        return Statistics(
            [queue.counters() for queue in self.queues], [queue.latency() for queue in self.queues]
        )


def _nothing() -> None:
    """Nobody has to be told."""
