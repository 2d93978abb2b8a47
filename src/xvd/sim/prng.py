# SPDX-License-Identifier: Apache-2.0
"""The simulator's source of chance: integers only, so that a seed means the same next year."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

_MASK = (1 << 64) - 1


class Prng:
    """splitmix64 (Steele, Lea, Flood 2014): its sequence is a few lines of arithmetic."""

    def __init__(self, seed: int) -> None:
        self._state = seed & _MASK

    def next(self) -> int:
        """64 bits."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        z = self._state
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & _MASK
        return z ^ z >> 31

    def below(self, bound: int) -> int:
        """0..bound-1; the bias of the remainder is far below what a run could show."""
        return self.next() % bound

    def between(self, low: int, high: int) -> int:
        """low..high, both included."""
        return low + self.below(high - low + 1)

    def chance(self, one_in: int) -> bool:
        """True once in so many draws on average; never if it is 0."""
        return one_in > 0 and self.below(one_in) == 0

    def choose(self, values: Sequence[T]) -> T:
        """Draw one of them."""
        return values[self.below(len(values))]

    def maybe(self, *values: int) -> int:
        """Draw 0 half of the times, and otherwise one of the values."""
        return self.choose(values) if self.chance(2) else 0

    def weighted(self, weights: dict[T, int]) -> T:
        """Draw one of the keys, by weight; a weight of 0 is never drawn."""
        at = self.below(sum(weights.values()))
        for value, weight in weights.items():
            if at < weight:
                return value
            at -= weight
        raise AssertionError("weights add up")

    def fork(self) -> "Prng":
        """An independent generator, so that one part's draws do not move another's."""
        return Prng(self.next())
