# SPDX-License-Identifier: Apache-2.0
"""Looks at nodes are free until there are too many of them."""

import pytest

from xvd.xenbus.pace import READS_FREE, READS_PER_SECOND, Pace


class Clock:
    now = 5.0

    def __call__(self) -> float:
        return self.now


def test_a_life_cycles_looks_wait_for_nothing() -> None:
    pace = Pace(Clock())

    assert [pace.wait_s() for _ in range(READS_FREE)] == [0.0] * READS_FREE


def test_a_storm_is_looked_at_so_often_in_a_second() -> None:
    clock = Clock()
    pace = Pace(clock)
    reads, end = 0, clock.now + 10

    while clock.now < end:
        clock.now += pace.wait_s()
        reads += 1

    assert reads == pytest.approx(READS_FREE + 10 * READS_PER_SECOND, abs=2)


def test_after_a_quiet_second_looks_are_free_again() -> None:
    clock = Clock()
    pace = Pace(clock)
    for _ in range(READS_FREE + 1):
        clock.now += pace.wait_s()

    clock.now += 1.0

    assert [pace.wait_s() for _ in range(40)] == [0.0] * 40
