# SPDX-License-Identifier: Apache-2.0
"""What a disk's queues have counted: by queue, added up, and over all connections."""

from collections.abc import Iterable
from dataclasses import dataclass, field

Latency = dict[str, list[int]]

_NOW = ("in_flight",)
"""The counters of a moment: they are empty again when a connection has ended."""


@dataclass(slots=True)
class Statistics:
    """Counters and latency histograms of each queue; see `FrontQueue` for what each means."""

    counters: list[dict[str, int]] = field(default_factory=list)
    latencies: list[Latency] = field(default_factory=list)

    def total(self) -> dict[str, int]:
        """The counters of all queues, added up."""
        return _add(self.counters)

    def latency(self) -> Latency:
        """The histograms of all queues, added up: by kind, count i from 2**i nanoseconds on."""
        kinds = self.latencies[0] if self.latencies else ()
        return {
            kind: [
                sum(counts) for counts in zip(*(one[kind] for one in self.latencies), strict=True)
            ]
            for kind in kinds
        }

    def figures(self) -> dict[str, object]:
        """Return every figure by name, for people and programs."""
        return {
            "frontend": self.total(),
            "frontend_queues": self.counters,
            "frontend_latency": self.latency(),
        }

    def closed(self) -> "Statistics":
        """Return the counters of a connection that has ended."""
        return Statistics([one | dict.fromkeys(_NOW, 0) for one in self.counters], self.latencies)

    def plus(self, later: "Statistics") -> "Statistics":
        """Add those of a later connection: queue by queue, as many as either has at most."""
        a, b = self, later
        count = max(len(a.counters), len(b.counters))
        return Statistics(
            [_add([*a.counters[i : i + 1], *b.counters[i : i + 1]]) for i in range(count)],
            [
                Statistics([], [*a.latencies[i : i + 1], *b.latencies[i : i + 1]]).latency()
                for i in range(count)
            ],
        )


def _add(counters: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counters:
        for name, value in one.items():
            total[name] = total.get(name, 0) + value
    return total


def percentile(counts: list[int], percent: float) -> int:
    """Nanoseconds below which `percent` of 100 of a histogram's answers came; 0 if it is empty.

    The upper bound of the bucket in which that answer lies.
    """
    wanted, seen = sum(counts) * percent / 100, 0
    for bucket, count in enumerate(counts):
        seen += count
        if count and seen >= wanted:
            return 2 << bucket
    return 0
