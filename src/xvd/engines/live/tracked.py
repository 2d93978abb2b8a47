# SPDX-License-Identifier: Apache-2.0
"""What of a disk was changed, in maps (changes.pyx)."""

from collections.abc import Callable, Sequence

from xvd.engines.changes import ChangeMap, TrackedChannel, map_size
from xvd.engines.interface import Channel, Engine
from xvd.engines.layers.base import Asked, Layer
from xvd.types import EngineOp

__all__ = ["CHANGING", "ChangeMap", "Tracked", "map_size"]

CHANGING = frozenset((EngineOp.WRITE, EngineOp.DISCARD))
"""The operations after which a range may hold something else."""


class Tracked(Layer):
    """Marks in every one of `maps`, which are of this storage's size, what is written or discarded;
    before the storage has it."""

    def __init__(self, lower: Engine, maps: Sequence[ChangeMap]) -> None:
        super().__init__(lower)
        self._maps = tuple(maps)

    def perform(self, asked: Asked, do: Callable[[], None]) -> None:
        """Mark, then do it."""
        if asked.op in CHANGING:
            for one in self._maps:
                one.mark(asked.offset, asked.length)
        do()

    def open_channel(self) -> Channel:
        """A compiled channel in front of the storage's."""
        return TrackedChannel(self.lower.open_channel(), self._maps)
