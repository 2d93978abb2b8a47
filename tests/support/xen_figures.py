# SPDX-License-Identifier: Apache-2.0
"""Figures of backends measured beside each other: kept as JSON lines, shown as Markdown tables.

`python tests/support/xen_figures.py FILE` prints the tables of a file of such lines, and what they
are of.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """One measurement of one job on one disk.

    host: the Xen host it is of. queues: of the disk. backend: who served it. dom0_us: CPU time of
    dom0 for each operation, whatever for. back_us: of the backend's own threads. front_us: of the
    frontend's, where it is in dom0 too.
    """

    host: str
    queues: int
    frontend: str
    job: str
    backend: str
    round: int
    operations: int
    seconds: float
    dom0_us: float
    back_us: float
    front_us: float | None = None

    @property
    def iops(self) -> float:
        return self.operations / self.seconds


def keep(path: Path, figures: Iterable[Figure]) -> None:
    """Add figures to a file."""
    with path.open("a") as file:
        file.writelines(json.dumps(asdict(figure)) + "\n" for figure in figures)


def kept(path: Path) -> list[Figure]:
    return [Figure(**json.loads(line)) for line in path.read_text().splitlines()]


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _median(figures: Iterable[Figure], of: Callable[[Figure], float]) -> str:
    return f"{statistics.median(map(of, figures)):,.0f}"


def ratio(ours: Sequence[Figure], others: Sequence[Figure]) -> float:
    """The median of the rounds' ratios: what one round has in common falls out."""
    pairs = zip(ours, others, strict=True)
    return statistics.median(a.iops / b.iops for a, b in pairs)


def _row(job: str, by_backend: dict[str, list[Figure]]) -> str:
    ours, *others = by_backend.values()
    cells = [job]
    cells += [_median(those, lambda one: one.iops) for those in by_backend.values()]
    cells += [f"{ratio(ours, those):.3g}" for those in others]
    cells += [_median(those, lambda one: one.back_us) for those in by_backend.values()]
    return f"| {' | '.join(cells)} |"


def _mean(rows: Iterable[dict[str, list[Figure]]], backend: str) -> str:
    """The geometric mean of the ratios to one backend."""
    found = []
    for by_backend in rows:
        ours = next(iter(by_backend.values()))
        found.append(ratio(ours, by_backend[backend]))
    return f"{statistics.geometric_mean(found):.2f} of {backend}"


def markdown(figures: Sequence[Figure]) -> str:
    """A table for each frontend; the first backend is the one that the others are compared with."""
    first = figures[0]
    queues = "one queue" if first.queues == 1 else f"{first.queues} queues"
    parts = [f"### {first.host}, {queues}\n"]
    backends = _distinct(figure.backend for figure in figures)
    every = []
    for frontend in _distinct(figure.frontend for figure in figures):
        mine = [figure for figure in figures if figure.frontend == frontend]
        rounds = len({figure.round for figure in mine})
        parts.append(f"{frontend}; medians of {rounds} rounds:\n")
        columns = [f"{backend} IOPS" for backend in backends]
        columns += [f"of {backend}" for backend in backends[1:]]
        columns += [f"backend CPU us/op: {backends[0]}", *backends[1:]]
        parts.append(f"| job | {' | '.join(columns)} |")
        parts.append("|---|" + "--:|" * len(columns))
        for job in _distinct(figure.job for figure in mine):
            row = {b: [f for f in mine if (f.job, f.backend) == (job, b)] for b in backends}
            every.append(row)
            parts.append(_row(job, row))
        parts.append("")
    means = " and ".join(_mean(every, backend) for backend in backends[1:])
    parts.append(f"Geometric mean over both tables: {means}.\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(markdown(kept(Path(sys.argv[1]))))
