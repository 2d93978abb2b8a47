# SPDX-License-Identifier: Apache-2.0
"""``xvd sim``: the deterministic simulator."""

import logging
import secrets
import traceback
from enum import Enum
from typing import Annotated

import typer

from xvd.cli import common, output
from xvd.sim.runner import KINDS, run_seeds


class World(Enum):
    """What is simulated."""

    QUEUES = "queues"
    DEVICES = "devices"


def sim(
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="The seed; drawn and printed if not given.")
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="How many seeds to run, beginning with this one.")
    ] = 1,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Of each run's faulty phase.")
    ] = None,
    world: Annotated[
        World, typer.Option("--world", help="The queues alone, or both ends whole.")
    ] = World.QUEUES,
) -> int:
    """Run the shipped queues, or both ends whole, in a simulated world, with faults.

    The same seed is the same run. Fails with the seed of the first run in which a check does not
    hold.
    """
    if seed is None:
        seed = secrets.randbits(32)
    kind = KINDS[world.value]
    steps = steps or kind.steps
    options = kind.draw(seed, steps)
    output.tell(kind.describe(options) + "\n")
    if seeds == 1:
        output.tell(f"passed: {kind.run(options)}\n")
        return 0
    # What the drivers tell of thousands of faults is of no use; one seed shows it again.
    logging.getLogger("xvd").setLevel(logging.CRITICAL)
    return _many(world, seed, seeds, steps)


def _many(world: World, seed: int, seeds: int, steps: int) -> int:
    from rich.progress import Progress

    kind = KINDS[world.value]
    with Progress(console=common.stderr(), transient=True) as progress:
        task = progress.add_task("seeds", total=seeds)
        failure = run_seeds(kind, seed, seeds, steps, lambda n: progress.update(task, completed=n))
    if failure is None:
        output.tell(f"passed: {seeds} seeds\n")
        return 0
    bad, error = failure
    output.tell(kind.describe(kind.draw(bad, steps)) + "\n")
    output.tell("".join(traceback.format_exception(error)))
    again = f"xvd sim --world {world.value} --seed {bad} --steps {steps}"
    output.tell(f"failed: again with: {again}\n")
    return 1
