# SPDX-License-Identifier: Apache-2.0
"""``xvd bench``: what the data path does on this machine, side by side with what one could use.

Every figure of a run is taken in that run; only ratios mean anything on another day.
"""

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from xvd.bench import page
from xvd.bench.experiments import EXPERIMENTS
from xvd.bench.peers import NotInstalled
from xvd.bench.report import Report, as_json, as_text, machine
from xvd.bench.run import Run
from xvd.cli import common, output
from xvd.errors import ConfigError

TINY = 0.005
"""Of the full length, for a run that proves only that all of it works."""


def bench(
    experiments: Annotated[
        list[str] | None,
        typer.Argument(help=f"Any of {', '.join(EXPERIMENTS)}; none: all."),
    ] = None,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Medians are of so many.")] = 5,
    tiny: Annotated[bool, typer.Option("--tiny", help="One short round of everything.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Write a page with plots: a file NAME.md. What it has of other experiments stays.",
        ),
    ] = None,
    disk: Annotated[
        Path, typer.Option("--disk", help="Directory on a real file system, for images.")
    ] = Path("/var/tmp"),
    seed: Annotated[int, typer.Option("--seed", min=1)] = 1,
    json: common.Json = False,
) -> int:
    """Measure the data path: the experiments, or some of them. `xvd load` is a load of your own."""
    wanted = experiments or list(EXPERIMENTS)
    unknown = [name for name in wanted if name not in EXPERIMENTS]
    if unknown:
        raise ConfigError(f"there is no experiment {unknown[0]!r}; there are "
                          f"{', '.join(EXPERIMENTS)}")  # fmt: skip
    rounds = 1 if tiny else runs
    with tempfile.TemporaryDirectory(prefix="xvd-bench-") as directory, _progress() as show:
        run = Run(
            rounds, TINY if tiny else 1.0, Path(directory), disk, seed,
            lambda name: show.update(show.task_ids[0], advance=1, case=name, refresh=True),
        )  # fmt: skip
        reports: list[Report] = []
        for report in _measure(wanted, run, show):
            reports.append(report)
            if out is not None:  # after each: a run that is cut short leaves what it has measured
                page.write(reports, out, rounds=rounds, order=list(EXPERIMENTS))
    if json:
        output.print_json({"machine": machine(), "experiments": [as_json(r) for r in reports]})
    else:
        output.tell("\n".join(as_text(report) for report in reports))
    return 0


def _measure(wanted: Sequence[str], run: Run, show: Progress) -> Iterator[Report]:
    for name in wanted:
        show.update(show.task_ids[0], description=name)
        try:
            yield EXPERIMENTS[name](run)
        except NotInstalled as error:
            if len(wanted) == 1:
                raise
            sys.stderr.write(f"xvd: {name} is left out: {error}\n")


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    columns = (
        SpinnerColumn(), TextColumn("{task.description}: {task.fields[case]}"),
        TextColumn("{task.completed:.0f}"), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=common.stderr(), transient=True, auto_refresh=False) as show:
        show.add_task("", total=None, case="")
        yield show
