# SPDX-License-Identifier: Apache-2.0
"""What a frontend has with one backend: its queues, each with a ring, a port, pages and a thread.

It comes about in two steps, as a backend says what it can in two: rings and ports are there before
they are published, data pages and queues when the backend is connected. Either step is made whole
or not at all; where a budget is too small for what was wanted, less is taken.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from xvd.blkif.abi import MAX_SEGMENTS_PER_REQUEST, Abi
from xvd.blkif.features import BackendFeatures
from xvd.blkif.nodes import FrontendConfig
from xvd.dataplane.front.options import FrontOptions
from xvd.dataplane.front.queue import FrontQueue
from xvd.dataplane.loop.thread import LoopOptions, Queue
from xvd.errors import EventChannelError, GrantError, PeerProtocolError, XenstoreError
from xvd.frontend.settings import Settings
from xvd.frontend.statistics import FrontCounters, Statistics
from xvd.machine.interface import Machine, SharedPages
from xvd.types import PAGE_SIZE, RING_SECTOR_SIZE, Domid
from xvd.xenbus.links import FrontLink, Links
from xvd.xenbus.runner import Runtime

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
            log.info("%s: fewer queues or smaller rings", error, event="no-room")
            queues, ring_page_order = less
        except BaseException:
            connection.release()
            raise
        else:
            return connection


class Connection(Links[FrontLink]):
    """Our side of one connection.

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
    ) -> None:
        super().__init__()
        self._machine = machine
        self._peer = peer
        self._handle = handle & 0xFFFF
        self._name = name
        self._settings = settings
        self._trusted = trusted
        self._idle = asyncio.Event()
        self._on_end: Callable[[], None] | None = None
        self._scanner: asyncio.TimerHandle | None = None
        self.queues: list[FrontQueue] = []
        self.persistent = False
        self._take_rings(abi, queues, ring_page_order)
        published = tuple(link.nodes for link in self.links)
        self.config = FrontendConfig(
            abi, published, settings.feature_persistent, settings.large_sectors
        )

    # ---- Coming about ----

    def _take_rings(self, abi: Abi, queues: int, order: int) -> None:
        try:
            for _ in range(queues):
                self.links.append(FrontLink(self._machine, self._peer, 1 << order, abi))
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
        entries = self.links[0].entries
        segments = self._settings.segments(features)
        self.persistent = features.persistent and self._settings.feature_persistent
        pools, segments = self._take_pools(entries, segments)
        for link, pages in zip(self.links, pools, strict=True):
            link.own(pages.close)
        if features.sector_size > segments * PAGE_SIZE:
            raise PeerProtocolError(
                f"the backend's blocks have {features.sector_size} bytes, and a request at most "
                f"{segments * PAGE_SIZE}"
            )
        options = FrontOptions(
            handle=self._handle, segments_max=segments, persistent=self.persistent,
            trusted=self._trusted, page_grants=self._settings.page_size // PAGE_SIZE,
            block_sectors=features.sector_size // RING_SECTOR_SIZE,
            wire_sector=features.wire_sector,
        )  # fmt: skip
        for link, pages in zip(self.links, pools, strict=True):
            self.queues.append(link.prepare(pages, options))

    def _take_pools(self, entries: int, segments: int) -> tuple[list[SharedPages], int]:
        """Pages for each queue, and the segments of a request that they are enough for."""
        grants = self._settings.page_size // PAGE_SIZE
        request = FrontQueue.pages_needed(segments, grants)
        size = max(request, min(entries * request, self._settings.pool_pages // grants * grants))
        while size >= request:
            taken: list[SharedPages] = []
            try:
                for _ in self.links:
                    taken.append(self._machine.grants.share(self._peer, size))
            except GrantError:
                for pages in taken:
                    pages.close()
                if size == request and segments == MAX_SEGMENTS_PER_REQUEST:
                    raise
                size = max(request, size // 2 // grants * grants) if size > request else 0
            else:
                return taken, segments
        return self._take_pools(entries, MAX_SEGMENTS_PER_REQUEST)

    # ---- Running ----

    def use(
        self,
        runtime: Runtime,
        on_exit: Callable[[], None],
        stepper: Stepper | None = None,
    ) -> None:
        """Run the queues. See `Links.start`; `end` is due in any case."""
        queues = stepper(self.queues) if stepper is not None else self.queues
        options = LoopOptions(poll_s=self._settings.poll_s, holdoff_s=self._settings.holdoff_s)
        self._on_end = on_exit
        self.start(queues, self._name, runtime, options, self._all_ended)
        if self.persistent:
            self._scan_later()

    def _all_ended(self) -> None:
        self._stop_scanning()
        self._idle.set()
        if self._on_end is not None:
            self._on_end()

    def give_up(self) -> None:
        """Leave the other queues at once: one is broken."""
        self.abandon()

    def _scan_later(self) -> None:
        self._scanner = asyncio.get_running_loop().call_later(SCAN_S, self._scan)

    def _scan(self) -> None:
        for queue in self.queues:
            queue.scan()
        self.wake_all()
        self._scan_later()

    def _stop_scanning(self) -> None:
        if self._scanner is not None:
            self._scanner.cancel()
            self._scanner = None

    async def end(self) -> None:
        """Abandon, wait for the threads, release."""
        self.abandon()
        if self.running:
            await self._idle.wait()
        self.release()

    def release(self) -> None:
        """End the grants, free the ports; only when nothing runs. Idempotent.

        Pages that the backend still maps are freed when it unmaps them, and not reused before.
        """
        self._stop_scanning()
        self.queues.clear()
        self._on_end = None
        super().release()

    # ---- Use ----

    @property
    def barrier_sectors_max(self) -> int:
        """Sectors of the largest barrier: it cannot be split."""
        return self.queues[0].barrier_sectors_max

    def statistics(self) -> Statistics:
        """The figures of each queue."""
        return Statistics(
            [FrontCounters.of(it.counters() | {"latency": it.latency()}) for it in self.queues]
        )
