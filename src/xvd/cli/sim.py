# SPDX-License-Identifier: Apache-2.0
"""``xvd sim``: the deterministic simulator."""

import secrets
import traceback
from typing import Annotated

import typer
from rich.progress import Progress

from xvd.cli import common, output
from xvd.sim.runner import STEPS, describe, run_seed, run_seeds
from xvd.sim.world import Options


def sim(
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="The seed; drawn and printed if not given.")
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="How many seeds to run, beginning with this one.")
    ] = 1,
    steps: Annotated[
        int, typer.Option("--steps", min=1, help="Of each run's faulty phase.")
    ] = STEPS,
) -> int:
    """Run the shipped queues in a simulated world, with faults; the same seed is the same run.

    Fails with the seed of the first run in which a check does not hold.
    """
    if seed is None:
        seed = secrets.randbits(32)
    output.tell(describe(Options.draw(seed, steps)) + "\n")
    if seeds == 1:
        summary = run_seed(seed, steps)
        output.tell(
            f"passed: {summary.finished} operations, {summary.failed} failed as they should, "
            f"{summary.deaths} deaths, {summary.replacements} replacements, "
            f"{summary.resizes} resizes, {summary.virtual_s:.3f} s of virtual time, "
            f"digest {summary.digest}\n"
        )
        return 0
    return _many(seed, seeds, steps)


def _many(seed: int, seeds: int, steps: int) -> int:
    with Progress(console=common.stderr(), transient=True) as progress:
        task = progress.add_task("seeds", total=seeds)
        failure = run_seeds(seed, seeds, steps, lambda n: progress.update(task, completed=n))
    if failure is None:
        output.tell(f"passed: {seeds} seeds\n")
        return 0
    bad, error = failure
    output.tell(describe(Options.draw(bad, steps)) + "\n")
    output.tell("".join(traceback.format_exception(error)))
    output.tell(f"failed: again with: xvd sim --seed {bad} --steps {steps}\n")
    return 1
