# SPDX-License-Identifier: Apache-2.0
"""``stats``: counts what reaches the storage."""

from collections import Counter
from collections.abc import Callable

from xvd.engines.interface import Engine
from xvd.engines.layers.base import Asked, Layer, LayerKind


class Stats(Layer):
    """Counts operations, bytes and failures by kind; `counts` is a live Counter."""

    def __init__(self, lower: Engine) -> None:
        super().__init__(lower)
        self.counts: Counter[str] = Counter()

    def perform(self, asked: Asked, do: Callable[[], None]) -> None:
        """Count it and do it; what erases is counted with discards."""
        self.counts[asked.kind] += 1
        self.counts[asked.kind + "_bytes"] += asked.length
        do()


LAYER = LayerKind("stats", "counts operations", "stats", lambda lower, _: Stats(lower))
