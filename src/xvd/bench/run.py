# SPDX-License-Identifier: Apache-2.0
"""What an experiment needs besides its cases: how many rounds, how long, and where to put files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from xvd.bench.sample import Case, Rounds, Sample, interleave, median


@dataclass(frozen=True, slots=True)
class Run:
    """rounds: medians are of so many. scale: 1.0 for the full length of each measurement, less for
    a look. directory: for images and the probe; disk: for images on a real file system.
    """

    rounds: int
    scale: float
    directory: Path
    disk: Path
    seed: int = 1
    tick: Callable[[str], None] = field(default=lambda _: None)

    def operations(self, full: int) -> int:
        """So many operations, scaled; 64 at least."""
        return max(64, int(full * self.scale))

    def seconds(self, full: float) -> float:
        """So long, scaled; what a tool that counts whole seconds can still be told."""
        return max(1.0, full * self.scale)

    def measure(self, cases: Sequence[Case]) -> Rounds:
        """Run all of them, one after another, round after round."""
        return interleave(cases, self.rounds, self.tick)


def per_operation(samples: Sequence[Sample], count: str) -> float:
    """The median of a count for each operation."""
    return median(samples, lambda s: s.counts.get(count, 0) / s.operations)


def cpu(samples: Sequence[Sample], side: str) -> float:
    """The median CPU time of an operation at one side, ``front`` or ``back``; nanoseconds."""
    return median(samples, lambda s: getattr(s, f"{side}_ns") or 0.0)


def iops(samples: Sequence[Sample]) -> float:
    """The median of operations per second."""
    return median(samples, lambda s: s.iops)


def mib(samples: Sequence[Sample]) -> float:
    """The median of MiB per second."""
    return median(samples, lambda s: s.mib_per_s)
