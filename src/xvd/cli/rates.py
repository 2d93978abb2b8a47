# SPDX-License-Identifier: Apache-2.0
"""Rates from two polls of every daemon's figures: of disks, of guests, and of queues."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from xvd.backend.counters import BackCounters
from xvd.cli.daemons import ALIVE, Answer
from xvd.types import RING_SECTOR_SIZE
from xvd.xenbus.counters import percentile, total

GONE: Final = "gone"
BUCKETS: Final = 40
"""Of a histogram of latencies: bucket i counts from 2^i ns to below twice that."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What one disk did between two polls, or one guest, or one queue.

    Rates are for a second, latencies in microseconds over reads and writes; `kept_percent`: of the
    grants that were used, how many were mapped already.
    """

    disk: str
    reads: float
    writes: float
    read_mb: float
    write_mb: float
    p50_us: float
    p99_us: float
    in_flight: int
    kept_percent: float
    refused: float
    errors: float


def counters_of(figures: dict[str, Any]) -> BackCounters:
    """Return a disk's counters; zeros for a disk that was not there."""
    return BackCounters.of(figures.get("counters", {}))


def rates(before: dict[str, Any], after: dict[str, Any], seconds: float) -> Rates:
    """Compute rates from two of a disk's figures; a disk that is new has done it all since."""
    return rates_between(after["disk"], counters_of(before), counters_of(after), seconds)


def rates_between(name: str, a: BackCounters, b: BackCounters, seconds: float) -> Rates:
    """Compute the rates of whatever has counted `a`, and `b` so many seconds later."""

    def rate(old: int, new: int) -> float:
        return max(0, new - old) / seconds

    latency = latency_between(a, b)
    hits = rate(a.persistent_hits, b.persistent_hits)
    misses = rate(a.persistent_misses, b.persistent_misses)
    return Rates(
        disk=name,
        reads=rate(a.rd_req, b.rd_req),
        writes=rate(a.wr_req, b.wr_req),
        read_mb=rate(a.rd_sect, b.rd_sect) * RING_SECTOR_SIZE / 1e6,
        write_mb=rate(a.wr_sect, b.wr_sect) * RING_SECTOR_SIZE / 1e6,
        p50_us=percentile(latency, 50) / 1000,
        p99_us=percentile(latency, 99) / 1000,
        in_flight=b.in_flight,
        kept_percent=100 * hits / (hits + misses) if hits + misses else 0.0,
        refused=rate(sum(a.refusals.values()), sum(b.refusals.values())),
        errors=rate(a.storage_errors, b.storage_errors),
    )


def latency_between(
    a: BackCounters, b: BackCounters, kinds: Sequence[str] = ("read", "write")
) -> list[int]:
    """Return the histogram of what was answered between two counts; not below zero."""
    latency = [0] * BUCKETS
    for kind in kinds:
        new, old = (side.latency.get(kind, [0] * BUCKETS) for side in (b, a))
        latency = [seen + max(0, n - o) for seen, n, o in zip(latency, new, old, strict=True)]
    return latency


# ---- Polls -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Poll:
    """The figures of every disk by its directory, and how its daemon was at that time.

    A daemon that does not live has the disks that it had when it did. names: of guests, by their
    numbers, as far as somebody asked for them.
    """

    at: float
    disks: dict[str, dict[str, Any]]
    states: dict[str, str]
    names: dict[str, str] = field(default_factory=dict)

    @property
    def status(self) -> int:
        """The exit status that this makes: 1 if something is not served."""
        return 1 if any(state != ALIVE for state in self.states.values()) else 0

    @property
    def guests(self) -> dict[str, list[str]]:
        """The directories of each guest's disks, by the guest's number."""
        found: dict[str, list[str]] = {}
        for path, disk in self.disks.items():
            found.setdefault(guest_of(disk), []).append(path)
        return found


def guest_of(figures: dict[str, Any]) -> str:
    """Return the number of the guest whose disk it is."""
    return str(figures["disk"]).partition("/")[0]


def polled(
    before: Poll | None, answers: list[Answer], at: float, names: dict[str, str] | None = None
) -> Poll:
    """Merge these answers in: of the dead, what was known before."""
    disks: dict[str, dict[str, Any]] = dict(before.disks) if before else {}
    states = dict.fromkeys(disks, GONE)
    for answer in answers:
        had = [path for path, disk in disks.items() if disk["daemon"] == answer.daemon]
        if answer.state == ALIVE:
            for path in had:
                del disks[path], states[path]
            new = {it["path"]: it | {"daemon": answer.daemon} for it in answer.result}
            disks |= new
            states |= dict.fromkeys(new, ALIVE)
        elif had:
            states |= dict.fromkeys(had, answer.state)
        else:
            states[answer.daemon] = answer.state
    return Poll(at, disks, states, {} if names is None else names)


def rows_between(before: Poll, after: Poll) -> list[tuple[str, Rates | None]]:
    """(state, rates) of each disk; None for a daemon of which no disk is known."""
    seconds = after.at - before.at
    rows: list[tuple[str, Rates | None]] = []
    for name, state in after.states.items():
        disk = after.disks.get(name)
        row = rates(before.disks.get(name, {}), disk, seconds) if disk else None
        rows.append((state, row))
    return rows


def guests_between(before: Poll, after: Poll) -> Iterator[tuple[str, int, Rates]]:
    """Yield (number, how many disks, rates of all of them) of each guest."""
    for guest, paths in after.guests.items():
        a, b = (
            total(BackCounters, (counters_of(poll.disks.get(path, {})) for path in paths))
            for poll in (before, after)
        )
        yield guest, len(paths), rates_between(guest, a, b, after.at - before.at)


def queues_between(before: Poll, after: Poll) -> Iterator[tuple[str, int, Rates]]:
    """Yield (the disk's directory, number, rates) of each queue of each connected disk."""
    for path, disk in after.disks.items():
        old = before.disks.get(path, {}).get("queue_counters", [])
        for number, figures in enumerate(disk.get("queue_counters", [])):
            a = BackCounters.of(old[number] if number < len(old) else {})
            b = BackCounters.of(figures)
            yield path, number, rates_between(disk["disk"], a, b, after.at - before.at)
