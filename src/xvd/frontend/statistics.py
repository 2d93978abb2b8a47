# SPDX-License-Identifier: Apache-2.0
"""What a disk's queues have counted: by queue, added up, and over all connections."""

from dataclasses import dataclass, field
from itertools import zip_longest

from xvd.xenbus.counters import QueueCounters, of_the_moment, total


@dataclass(frozen=True, slots=True)
class FrontCounters(QueueCounters):
    """What a frontend's queues count.

    indirect, merged, split: requests with indirect descriptors, put together from several
    operations, and cut from one. waits: units that found no slot or no page. granted, revoked:
    grants made and ended; reused: persistent grants found in place. placed: pages that operations
    keep their data in.
    """

    indirect: int = 0
    merged: int = 0
    split: int = 0
    waits: int = 0
    granted: int = 0
    revoked: int = 0
    reused: int = 0
    placed: int = of_the_moment()


@dataclass(slots=True)
class Statistics:
    """The counters of each queue."""

    queues: list[FrontCounters] = field(default_factory=list)

    def total(self) -> FrontCounters:
        """The counters of all queues, added up."""
        return total(FrontCounters, self.queues)

    def figures(self) -> dict[str, object]:
        """Return every figure by name, for people and programs."""
        together = self.total()
        return {
            "frontend": together.numbers(),
            "frontend_queues": [one.numbers() for one in self.queues],
            "frontend_latency": together.latency,
            "frontend_latency_ns": together.latency_ns,
        }

    def closed(self) -> "Statistics":
        """Return the counters of a connection that has ended."""
        return Statistics([one.over() for one in self.queues])

    def plus(self, later: "Statistics") -> "Statistics":
        """Add those of a later connection: queue by queue, as many as either has at most."""
        pairs = zip_longest(self.queues, later.queues, fillvalue=FrontCounters())
        return Statistics([one + other for one, other in pairs])
