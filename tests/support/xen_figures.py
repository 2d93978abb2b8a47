# SPDX-License-Identifier: Apache-2.0
"""Figures of backends measured beside each other: kept as JSON lines, shown as Markdown tables.

`python tests/support/xen_figures.py FILE` prints the tables of a file of such lines.
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

    backend: who served it. dom0_us: CPU time of dom0 for each operation, whatever for. back_us: of
    the backend's own threads. front_us: of the frontend's, where it is in dom0 too.
    """

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


def _median(figures: Iterable[Figure], of: Callable[[Figure], float | None]) -> str:
    found = [value for value in map(of, figures) if value is not None]
    return f"{statistics.median(found):,.0f}" if found else "-"


def _times(ours: Sequence[Figure], others: Sequence[Figure]) -> str:
    """The median of the rounds' ratios: what one round has in common falls out."""
    pairs = zip(ours, others, strict=True)
    return f"{statistics.median(a.iops / b.iops for a, b in pairs):.2f}"


def markdown(figures: Sequence[Figure]) -> str:
    """A table for each frontend; the first backend is the one that the others are compared with."""
    parts = []
    for frontend in _distinct(figure.frontend for figure in figures):
        mine = [figure for figure in figures if figure.frontend == frontend]
        rounds = len({figure.round for figure in mine})
        parts.append(f"{frontend}; medians of {rounds} rounds, CPU times for each operation\n")
        first = mine[0].backend
        columns = ("IOPS", f"{first} is", "dom0 us", "backend us", "frontend us")
        parts.append(f"| job | backend | {' | '.join(columns)} |")
        parts.append("|---|---|" + "--:|" * len(columns))
        for job in _distinct(figure.job for figure in mine):
            ours = [one for one in mine if (one.job, one.backend) == (job, first)]
            for backend in _distinct(figure.backend for figure in mine):
                those = [one for one in mine if (one.job, one.backend) == (job, backend)]
                cells = (
                    job,
                    backend,
                    _median(those, lambda one: one.iops),
                    _times(ours, those) + " times" if backend != first else "",
                    _median(those, lambda one: one.dom0_us),
                    _median(those, lambda one: one.back_us),
                    _median(those, lambda one: one.front_us),
                )
                parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(markdown(kept(Path(sys.argv[1]))))
