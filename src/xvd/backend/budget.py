# SPDX-License-Identifier: Apache-2.0
"""What a host has to give to its disks, counted before it runs out, and what a disk gets of it.

A connection takes what its rings keep: mappings (Linux allows a process 65530), map-track entries,
memory and descriptors. What a request has only while it is in flight is not counted: it has what is
left, which the limits of a host leave room for, and goes by grant copy when there is none.

Where something is short a disk gets less of what would take it: fewer queues, smaller rings, fewer
segments, fewer grants that stay mapped, grant copy. What cannot be had even so is refused.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Final

from xvd.backend.settings import Settings
from xvd.blkif.abi import MAX_SEGMENTS_PER_REQUEST
from xvd.blkif.features import BackendFeatures, useful_indirect
from xvd.blkif.nodes import FrontendConfig
from xvd.dataplane.back.queue import memory_of
from xvd.errors import BudgetError
from xvd.types import PAGE_SIZE

QUEUE_MAPPINGS: Final = 16
"""Of a queue without its grants: ring, stack of the thread, io_uring, arrays."""
QUEUE_DESCRIPTORS: Final = 9
"""Of a queue: io_uring, gntdev or the peer's memory, event channel, bells, storage's
bell, and its own description of a file for flushes."""
DISK_DESCRIPTORS: Final = 4
PASSING: Final = 1056
"""Mappings in flight on a ring that keeps none: what fills a ring of one page, of Linux's."""
KEPT_MIN: Final = 33
"""Fewer are not worth keeping: one request of Linux's frontend."""
SHARE: Final = 8
"""No disk takes more than an eighth of what is left while it can do with less, so that the first
ones do not leave nothing to those that come later."""

REMEDIES: Final = {
    "mappings": "raise it: sysctl vm.max_map_count=262144; or serve with --copy",
    "grants": "lower max_persistent_grants, or boot Xen with more max_maptrack_frames",
    "memory": "lower max_queues, max_ring_page_order or max_buffer_pages, or add memory",
    "descriptors": "raise the limit of open files: ulimit -n, or LimitNOFILE= of the unit",
}


@dataclass(frozen=True, slots=True)
class Amounts:
    """So much of each. mappings: of this process. grants: map-track entries of this domain.
    memory: bytes. descriptors: open files."""

    mappings: int = sys.maxsize
    grants: int = sys.maxsize
    memory: int = sys.maxsize
    descriptors: int = sys.maxsize

    def less(self, other: "Amounts") -> "Amounts":
        """Subtract another amount."""
        return Amounts(**{name: self.of(name) - other.of(name) for name in RESOURCES})

    def plus(self, other: "Amounts") -> "Amounts":
        """Add another amount."""
        return Amounts(**{name: self.of(name) + other.of(name) for name in RESOURCES})

    def of(self, name: str) -> int:
        """Return one amount by its name."""
        return int(getattr(self, name))


RESOURCES: Final = tuple(field.name for field in fields(Amounts))


@dataclass(frozen=True, slots=True)
class Claim:
    """What a connection would use, and so what it needs.

    entries: of a ring. segments: of the largest request. kept: grants that stay mapped for each
    ring, where persistent. copying: nothing is mapped. buffer_pages: kept by grant copy.
    """

    queues: int
    ring_pages: int
    segments: int
    persistent: bool
    kept: int
    copying: bool
    buffer_pages: int

    def instead_of(self, other: "Claim") -> str:
        """Tell people what is different: ``queues 1 instead of 4``."""
        names = (field.name for field in fields(self))
        values = ((name, getattr(self, name), getattr(other, name)) for name in names)
        return ", ".join(
            f"{name} {ours} instead of {its}" for name, ours, its in values if ours != its
        )

    def limit(self, settings: Settings) -> Settings:
        """Return the settings, as far as there is room for them."""
        return replace(
            settings,
            copying=self.copying,
            max_persistent_grants=self.kept,
            scale_persistent_grants=False,
            max_buffer_pages=self.buffer_pages,
        )

    @property
    def need(self) -> Amounts:
        """Add up what all its queues keep."""
        mapped = 0 if self.copying else self.kept if self.persistent else PASSING
        entries = 32 * self.ring_pages
        indirect = self.segments if self.segments > MAX_SEGMENTS_PER_REQUEST else 0
        memory = memory_of(entries, indirect, self.kept if self.persistent else 0)
        buffers = self.buffer_pages * PAGE_SIZE if self.copying else 0
        return Amounts(
            mappings=self.queues * (QUEUE_MAPPINGS + mapped),
            grants=self.queues * (self.ring_pages + 1 + mapped),
            memory=self.queues * (memory + buffers),
            descriptors=DISK_DESCRIPTORS + self.queues * QUEUE_DESCRIPTORS,
        )


def _fewer_queues(claim: Claim) -> Claim | None:
    return replace(claim, queues=claim.queues // 2) if claim.queues > 1 else None


def _smaller_ring(claim: Claim) -> Claim | None:
    return replace(claim, ring_pages=claim.ring_pages // 2) if claim.ring_pages > 1 else None


def _fewer_segments(claim: Claim) -> Claim | None:
    less = max(claim.segments // 2, MAX_SEGMENTS_PER_REQUEST)
    return replace(claim, segments=less) if less < claim.segments else None


def _fewer_kept(claim: Claim) -> Claim | None:
    less = claim.kept // 2
    keeping = claim.persistent and not claim.copying and less >= KEPT_MIN
    return replace(claim, kept=less) if keeping else None


def _copy(claim: Claim) -> Claim | None:
    return None if claim.copying else replace(claim, copying=True, persistent=False, kept=0)


def _fewer_buffers(claim: Claim) -> Claim | None:
    less = claim.buffer_pages // 2
    return replace(claim, buffer_pages=less) if claim.copying and claim.buffer_pages else None


Step = Callable[[Claim], Claim | None]
NEGOTIABLE: Final[Sequence[Step]] = (
    _fewer_queues, _smaller_ring, _fewer_segments, _fewer_kept, _copy, _fewer_buffers,
)  # fmt: skip
"""What a disk does without before its frontend is told what there is, the first first."""
AGREED: Final[Sequence[Step]] = (_fewer_kept, _copy, _fewer_buffers)
"""What it can still do without when queues and rings are agreed on."""
LIVE: Final[Sequence[Step]] = (_fewer_kept, _fewer_buffers)
"""What it can do without while it runs."""


class Lease:
    """What a connection has taken, until `close`, which is idempotent."""

    def __init__(self, budget: "Budget", claim: Claim) -> None:
        self.claim = claim
        self._budget: Budget | None = budget

    def change(self, claim: Claim, steps: Sequence[Step]) -> Claim:
        """Take this instead, after `Budget.fit`; `BudgetError`, and then nothing has changed."""
        assert self._budget is not None
        budget, before = self._budget, self._budget.left
        budget.left = before.plus(self.claim.need)
        try:
            self.claim = budget.fit(claim, steps)
        except BudgetError:
            budget.left = before
            raise
        budget.left = budget.left.less(self.claim.need)
        return self.claim

    def close(self) -> None:
        """Give it back."""
        if self._budget is not None:
            self._budget.left = self._budget.left.plus(self.claim.need)
            self._budget = None


class Budget:
    """What is left for the disks of a daemon. For the event loop's thread."""

    def __init__(self, limits: Amounts | None = None) -> None:
        self.left = limits or Amounts()

    def _short(self, need: Amounts, share: int) -> str:
        """The first resource of which it is more than a `share`-th part; empty if there is none."""
        for name in RESOURCES:
            if need.of(name) > self.left.of(name) // share:
                return name
        return ""

    def fit(self, claim: Claim, steps: Sequence[Step]) -> Claim:
        """The claim, or what becomes of it by as many `steps` as are needed; `BudgetError`."""
        while name := self._short(claim.need, SHARE):
            lesser = (step(claim) for step in steps)
            less = next((c for c in lesser if c and c.need.of(name) < claim.need.of(name)), None)
            if less is None:
                break
            claim = less
        if name := self._short(claim.need, 1):
            raise BudgetError(
                f"this host has no room for the disk: it needs {claim.need.of(name)} {name} at the "
                f"least, and {max(0, self.left.of(name))} are left; {REMEDIES[name]}",
                name,
            )
        return claim

    def take(self, claim: Claim, steps: Sequence[Step] = ()) -> Lease:
        """Take what the claim needs after `fit`; `BudgetError`, and then nothing is taken."""
        claim = self.fit(claim, steps)
        self.left = self.left.less(claim.need)
        return Lease(self, claim)


# ---- One disk ----------------------------------------------------------------------------------


def _claim_of(
    features: BackendFeatures, settings: Settings, config: FrontendConfig | None = None
) -> Claim:
    """Estimate what a connection uses of this host: as agreed, or the most if `config` is None."""
    ring_pages = config.ring_pages if config else 1 << features.max_ring_page_order
    persistent = features.persistent and (config is None or config.persistent)
    return Claim(
        queues=len(config.queues) if config else features.max_queues,
        ring_pages=ring_pages,
        segments=max(features.max_indirect_segments, MAX_SEGMENTS_PER_REQUEST),
        persistent=persistent and not settings.copying,
        kept=settings.persistent_grants_of(ring_pages),
        copying=settings.copying,
        buffer_pages=settings.max_buffer_pages,
    )


def _within(features: BackendFeatures, claim: Claim) -> BackendFeatures:
    """The features cut down to what a claim has room for."""
    indirect = min(features.max_indirect_segments, claim.segments)
    return replace(
        features,
        persistent=features.persistent and not claim.copying,
        max_indirect_segments=useful_indirect(indirect),
        max_ring_page_order=claim.ring_pages.bit_length() - 1,
        max_queues=claim.queues,
    )


class Room:
    """One disk's part of a budget."""

    def __init__(self, budget: Budget, log: logging.LoggerAdapter[logging.Logger]) -> None:
        self._budget = budget
        self._log = log

    def affordable(self, features: BackendFeatures, settings: Settings) -> BackendFeatures:
        """Cut it to what this host has room for now; leave it whole if not even the least can be
        had: the connection is refused then, unless there is room by that time."""
        wanted = _claim_of(features, settings)
        try:
            claim = self._budget.fit(wanted, NEGOTIABLE)
        except BudgetError:
            return features
        self._say_less(wanted, claim)
        return _within(features, claim)

    def take(self, features: BackendFeatures, settings: Settings, config: FrontendConfig) -> Lease:
        """Take what a connection keeps, or less of it; `BudgetError` says what there is none of."""
        wanted = _claim_of(features, settings, config)
        lease = self._budget.take(wanted, AGREED)
        self._say_less(wanted, lease.claim)
        return lease

    def change(self, lease: Lease, ring_pages: int, settings: Settings) -> Settings:
        """Other settings for a connection, as far as there is room beside what others have."""
        wanted = replace(
            lease.claim,
            kept=settings.persistent_grants_of(ring_pages),
            buffer_pages=settings.max_buffer_pages,
        )
        try:
            claim = lease.change(wanted, LIVE)
        except BudgetError as error:
            self._log.warning("%s: what it keeps stays as it was", error, event="no-room")
            claim = lease.claim
        return claim.limit(settings)

    def _say_less(self, wanted: Claim, claim: Claim) -> None:
        if claim != wanted:
            self._log.info(
                "this host has no room for all: %s", claim.instead_of(wanted), event="no-room"
            )
