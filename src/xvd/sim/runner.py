# SPDX-License-Identifier: Apache-2.0
"""Many seeds of a world, or one again."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

from xvd.sim.device_world import STEPS as DEVICE_STEPS
from xvd.sim.device_world import DeviceOptions, DeviceWorld
from xvd.sim.prng import Prng
from xvd.sim.world import Options, Summary, World

STEPS: Final = 600


def describe(options: Options) -> str:
    """The options of a run of the queues in one line, the seed first."""
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


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of world. draw: (seed, steps) -> options; describe: these in one line; run: one world,
    which raises `CheckFailed` or whatever broke. steps: of a run where nothing is said."""

    draw: Callable[[int, int], Any]
    describe: Callable[[Any], str]
    run: Callable[[Any], object]
    steps: int


KINDS: Final = {
    "queues": Kind(Options.draw, describe, lambda options: World(options).run(), STEPS),
    "devices": Kind(
        DeviceOptions.draw, str, lambda options: DeviceWorld(options).run(), DEVICE_STEPS
    ),
}
"""The queues alone, in any mode and under any fault; and both ends whole, handshakes included."""


def run_seed(seed: int, steps: int = STEPS) -> Summary:
    """Run one world of the queues; raises `CheckFailed`, or whatever broke."""
    return World(Options.draw(seed, steps)).run()


def seeds_from(seed: int, count: int) -> Iterator[int]:
    """`count` seeds that follow from one; the first is that one itself."""
    prng = Prng(seed)
    yield seed
    for _ in range(count - 1):
        yield prng.next() >> 32


def run_seeds(
    kind: Kind, seed: int, count: int, steps: int, progress: Callable[[int], None]
) -> tuple[int, Exception] | None:
    """Run many; the first seed that fails with its error, or None."""
    for done, each in enumerate(seeds_from(seed, count)):
        try:
            kind.run(kind.draw(each, steps))
        except Exception as error:
            return each, error
        progress(done + 1)
    return None
