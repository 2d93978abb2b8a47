# SPDX-License-Identifier: Apache-2.0
"""The model of many guests, where its answer can be worked out by hand."""

from dataclasses import replace

import pytest

from xvd.bench.model import Costs, predict

COSTS = Costs(front=200.0, back=100.0, switch=1600.0)
MAPPING = replace(COSTS, mapping=5000.0, shared=1000.0)


def test_a_cpu_for_each_thread_goes_as_fast_as_the_slower_end() -> None:
    assert predict(COSTS, guests=1, cpus=2, seconds=0.001) == pytest.approx(1e9 / 200, rel=0.05)
    assert predict(COSTS, guests=3, cpus=6, seconds=0.001) == pytest.approx(3e9 / 200, rel=0.05)


def test_one_cpu_does_the_work_of_both_ends_and_switches() -> None:
    ns = 200 + 100 + 2 * 1600 / 32  # a thread finds all that is under way when its turn comes
    assert predict(COSTS, guests=1, cpus=1, seconds=0.001) == pytest.approx(1e9 / ns, rel=0.05)


@pytest.mark.parametrize("guests", [2, 5, 10])
def test_mapping_is_one_after_the_other_and_slower_with_each_cpu(guests: int) -> None:
    ns = 5000 + 1000 * (guests - 1)
    found = predict(MAPPING, guests=guests, cpus=24, seconds=0.01)
    assert found == pytest.approx(1e9 / ns, rel=0.1)
