# SPDX-License-Identifier: Apache-2.0
"""Few combinations in which nevertheless every two values of any two dimensions meet.

Greedy and without chance: each case begins with a pair that is still missing, and takes in every
other dimension the value that brings the most missing pairs with it.
"""

from collections.abc import Hashable, Sequence
from itertools import combinations

Place = tuple[int, Hashable]
"""A dimension's number and one of its values."""


def pairs_of(case: Sequence[Hashable]) -> list[tuple[Place, Place]]:
    """The pairs that meet in a case."""
    return list(combinations(enumerate(case), 2))


def all_pairs(dimensions: Sequence[Sequence[Hashable]]) -> list[tuple[Place, Place]]:
    """Every pair that there is."""
    numbered = combinations(enumerate(dimensions), 2)
    return [((i, a), (j, b)) for (i, x), (j, y) in numbered for a in x for b in y]


def pairwise_cases(dimensions: Sequence[Sequence[Hashable]]) -> list[tuple[Hashable, ...]]:
    """Cases that cover all pairs, the same ones each time."""
    missing = dict.fromkeys(all_pairs(dimensions))
    cases = []
    while missing:
        case = dict(next(iter(missing)))
        for number, values in enumerate(dimensions):
            if number not in case:

                def brings(value: Hashable, number: int = number, case: dict = case) -> int:
                    met = [tuple(sorted(((number, value), one))) for one in case.items()]
                    return sum(pair in missing for pair in met)

                case[number] = max(values, key=brings)
        cases.append(tuple(case[number] for number in range(len(dimensions))))
        for pair in pairs_of(cases[-1]):
            missing.pop(pair, None)
    return cases
