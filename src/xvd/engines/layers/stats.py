# SPDX-License-Identifier: Apache-2.0
"""``stats``: counts what reaches the storage."""

from collections import Counter

from xvd.engines.interface import Engine
from xvd.engines.layers.base import Layer, LayerKind


class Stats(Layer):
    """Counts operations, bytes and failures by kind; `counts` is a live Counter."""

    def __init__(self, lower: Engine) -> None:
        super().__init__(lower)
        self.counts: Counter[str] = Counter()

    def read(self, buffer: memoryview, offset: int) -> None:
        """Count and read."""
        self._count("read", len(buffer))
        self.lower.read(buffer, offset)

    def write(self, buffer: memoryview, offset: int) -> None:
        """Count and write."""
        self._count("write", len(buffer))
        self.lower.write(buffer, offset)

    def flush(self) -> None:
        """Count and flush."""
        self._count("flush", 0)
        self.lower.flush()

    def discard(self, offset: int, length: int) -> None:
        """Count and discard."""
        self._count("discard", length)
        self.lower.discard(offset, length)

    def secure_discard(self, offset: int, length: int) -> None:
        """Count and erase; counted with discards."""
        self._count("discard", length)
        self.lower.secure_discard(offset, length)

    def _count(self, operation: str, size: int) -> None:
        self.counts[operation] += 1
        self.counts[operation + "_bytes"] += size


LAYER = LayerKind("stats", "counts operations", "stats", lambda lower, _: Stats(lower))
