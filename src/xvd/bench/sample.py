# SPDX-License-Identifier: Apache-2.0
"""What one measurement gave, and how many of them become a row: medians, and ratios by round.

The machine is never quiet. The cases of an experiment are therefore measured one by one, round
after round, and a ratio is taken between two cases of the same round; the median is of those.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xvd.errors import XvdError


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of one case.

    operations, seconds, bytes: what was done. front_ns, back_ns: CPU time of an operation at either
    end, nanoseconds, where it was measured. checksum: of the data read, where that is the same each
    time. counts: what was counted.
    """

    operations: int
    seconds: float
    bytes: int
    errors: int = 0
    front_ns: float | None = None
    back_ns: float | None = None
    checksum: str = ""
    counts: Mapping[str, float] = field(default_factory=dict)

    @property
    def iops(self) -> float:
        """Operations per second."""
        return self.operations / self.seconds

    @property
    def mib_per_s(self) -> float:
        """MiB (2^20 bytes) per second."""
        return self.bytes / self.seconds / (1 << 20)

    def as_fio(self, name: str, *, writing: bool) -> dict[str, Any]:
        """Shaped as one of the jobs in fio's JSON, for what reads that."""
        done = {
            "io_bytes": self.bytes,
            "bw_bytes": round(self.bytes / self.seconds),
            "iops": round(self.iops, 1),
            "runtime": round(self.seconds * 1000),
            "total_ios": self.operations,
        }
        nothing = dict.fromkeys(done, 0)
        read, write = (nothing, done) if writing else (done, nothing)
        return {"jobname": name, "error": self.errors, "read": read, "write": write}


@dataclass(frozen=True, slots=True)
class Case:
    """Something to be measured, as often as there are rounds."""

    name: str
    measure: Callable[[], Sample]


class WrongData(XvdError):
    """A measurement of something that did not do its work."""


Rounds = dict[str, list[Sample]]
"""Case's name: its samples, one of each round."""


def interleave(
    cases: Sequence[Case], rounds: int, tick: Callable[[str], None] = lambda _: None
) -> Rounds:
    """Measure all cases one by one, `rounds` times; `tick` is told what was measured.

    Raises `WrongData` if an operation failed, or the same reads did not find the same each time.
    """
    found: Rounds = {case.name: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            samples = found[case.name]
            samples.append(case.measure())
            tick(case.name)
            if samples[-1].errors:
                raise WrongData(f"{case.name}: {samples[-1].errors} operations failed")
            if samples[-1].checksum != samples[0].checksum:
                raise WrongData(f"{case.name}: two rounds did not read the same")
    return found


def median(samples: Iterable[Sample], of: Callable[[Sample], float]) -> float:
    """The median of a figure over the rounds."""
    return statistics.median(of(sample) for sample in samples)


def ratio(
    rounds: Rounds, name: str, to: str, of: Callable[[Sample], float] = lambda s: s.iops
) -> float:
    """How the case `name` compares with the case `to`: the median of the rounds' ratios."""
    pairs = zip(rounds[name], rounds[to], strict=True)
    return statistics.median(of(one) / of(other) for one, other in pairs)


def median_of(samples: Sequence[float]) -> float:
    """The median of bare numbers."""
    return statistics.median(samples)
