# SPDX-License-Identifier: Apache-2.0
"""Many seeds, or one again."""

from collections.abc import Callable, Iterator
from dataclasses import asdict

from xvd.sim.prng import Prng
from xvd.sim.world import Options, Summary, World

STEPS = 600


def describe(options: Options) -> str:
    """The options of a run in one line, the seed first."""
    faults = ", ".join(f"{name} 1/{n}" for name, n in asdict(options.faults).items() if n)
    shape = options.shape
    offers = ", ".join(name for name in ("flush", "barrier", "discard") if getattr(shape, name))
    mode = "copy" if options.copying else "map"
    if shape.persistent:
        mode = f"persistent, {shape.persistent_max} kept"
    return (
        f"seed {options.seed}: {shape.abi.protocol}, {shape.queues} queues of {shape.ring_pages} "
        f"ring pages, {offers}, "
        f"{shape.segments_max} segments, {shape.page_grants} grants to a page, "
        f"{shape.pages} pages, {mode}, {options.sectors} sectors, "
        f"depth {options.depth}, up to {options.sectors_max} sectors, "
        f"budget {options.budget_max}, {options.steps} steps; faults: {faults or 'none'}"
    )


def run_seed(seed: int, steps: int = STEPS) -> Summary:
    """Run one world; raises `CheckFailed`, or whatever broke."""
    return World(Options.draw(seed, steps)).run()


def seeds_from(seed: int, count: int) -> Iterator[int]:
    """`count` seeds that follow from one; the first is that one itself."""
    prng = Prng(seed)
    yield seed
    for _ in range(count - 1):
        yield prng.next() >> 32


def run_seeds(
    seed: int, count: int, steps: int, progress: Callable[[int], None]
) -> tuple[int, Exception] | None:
    """Run many; the first seed that fails with its error, or None."""
    for done, each in enumerate(seeds_from(seed, count)):
        try:
            run_seed(each, steps)
        except Exception as error:
            return each, error
        progress(done + 1)
    return None
