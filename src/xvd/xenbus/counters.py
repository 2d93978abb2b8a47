# SPDX-License-Identifier: Apache-2.0
"""What the queues of an end have counted: typed, by one name each, and added up."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, Self, TypeVar

Latency = dict[str, list[int]]
"""By kind of request, how many were answered after 2**i nanoseconds and before twice that."""

_MOMENT: Final = "moment"


def of_the_moment() -> int:
    """Make the field of a figure that is zero again when a connection has ended."""
    return field(default=0, metadata={_MOMENT: True})


@dataclass(frozen=True, slots=True)
class Counters:
    """The figures of a queue, or of several: numbers, and numbers by a further name."""

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> Self:
        """Make counters from what a queue or another process said by name.

        What is not there is zero, and what only another version counts is left out.
        """
        return cls(**{name: figures[name] for name in cls.names() if name in figures})

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return what every figure is called."""
        return tuple(one.name for one in fields(cls))

    def figures(self) -> dict[str, Any]:
        """Return every figure by name."""
        return {name: getattr(self, name) for name in self.names()}

    def numbers(self) -> dict[str, int]:
        """Return by name the figures that are one number."""
        return {name: value for name, value in self.figures().items() if isinstance(value, int)}

    def __add__(self, other: Self) -> Self:
        ours, theirs = self.figures(), other.figures()
        return type(self)(**{name: _sum(ours[name], theirs[name]) for name in ours})

    def over(self) -> Self:
        """Return these once their connection has ended: nothing is left of the moment."""
        moment = {one.name: 0 for one in fields(self) if _MOMENT in one.metadata}
        return type(self)(**self.figures() | moment)


C = TypeVar("C", bound=Counters)


def total(kind: type[C], parts: Iterable[C]) -> C:
    """Add up; zeros where there is nothing to add."""
    return sum(parts, start=kind())


@dataclass(frozen=True, slots=True)
class QueueCounters(Counters):
    """What a queue of either end counts.

    ``*_req``, ``*_sect``: requests of a kind, and their 512-byte sectors, by blkback's names.
    errors: requests that were answered with a failure. notified, suppressed: events sent, and held
    back because nobody had asked for one. latency: from when a request was taken, at the backend,
    or put on the ring, at the frontend. latency_ns: the sum of these times by kind of request.
    """

    rd_req: int = 0
    wr_req: int = 0
    f_req: int = 0
    ds_req: int = 0
    rd_sect: int = 0
    wr_sect: int = 0
    requests: int = 0
    responses: int = 0
    errors: int = 0
    notified: int = 0
    suppressed: int = 0
    steps: int = 0
    in_flight: int = of_the_moment()
    latency: Latency = field(default_factory=dict)
    latency_ns: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoopCounters(Counters):
    """What the threads of a connection count; see `Loop.counters`."""

    sleeps: int = 0
    wakeups: int = 0
    watchdogs: int = 0
    spurious: int = 0
    poll_ns: int = 0
    poll_max_ns: int = 0


def _sum(one: Any, other: Any) -> Any:
    if isinstance(one, dict):
        names = dict.fromkeys([*one, *other])
        return {
            n: _sum(one[n], other[n]) if n in one and n in other else one.get(n, other.get(n))
            for n in names
        }
    if isinstance(one, list):
        return [a + b for a, b in zip(one, other, strict=True)]
    return one + other


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
