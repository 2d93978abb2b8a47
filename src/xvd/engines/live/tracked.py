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
    before the storage has it. A storage that gets another size has changed as a whole: it may have
    its old size again when somebody looks, and not its old end."""

    def __init__(self, lower: Engine, maps: Sequence[ChangeMap]) -> None:
        super().__init__(lower)
        self._maps = tuple(maps)
        self._size = lower.info.size

    def perform(self, asked: Asked, do: Callable[[], None]) -> None:
        """Mark, then do it."""
        if asked.op in CHANGING:
            for one in self._maps:
                one.mark(asked.offset, asked.length)
        do()

    def measure(self) -> int:
        """Measure; others may have resized it."""
        size = self.lower.measure()
        if size != self._size:
            self._mark_all()
        self._size = size
        return size

    def resize(self, size: int) -> None:
        """Mark all, then resize."""
        self._mark_all()
        self.lower.resize(size)

    def _mark_all(self) -> None:
        for one in self._maps:
            one.mark_all()

    def open_channel(self) -> Channel:
        """A compiled channel in front of the storage's."""
        return TrackedChannel(self.lower.open_channel(), self._maps)
