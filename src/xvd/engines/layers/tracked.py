# SPDX-License-Identifier: Apache-2.0
"""What a disk's owner puts in front of its storage to know what was changed (changes.pyx).

No layer of a URI: the maps are somebody's, who reads them.
"""

from collections.abc import Callable, Sequence

from xvd.engines.changes import ChangeMap, TrackedChannel
from xvd.engines.interface import Channel, Engine
from xvd.engines.layers.base import Asked, Layer
from xvd.types import EngineOp

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
