# SPDX-License-Identifier: Apache-2.0
"""Storage that is made slower by rates."""

import pytest

from xvd.engines.layers.rate import Rate
from xvd.engines.memory import MemoryEngine
from xvd.engines.uri import open_engine
from xvd.errors import ConfigError


def test_an_operation_takes_its_time_and_that_of_its_bytes() -> None:
    slept: list[float] = []
    engine = Rate(MemoryEngine(1 << 20), each_s=0.5, byte_s=0.001, sleep=slept.append)

    engine.write(memoryview(bytes(1000)), 0)
    engine.read(memoryview(bytearray(512)), 0)
    engine.flush()
    engine.discard(0, 2000)

    assert slept == pytest.approx([1.5, 1.012, 2.5])


def test_rates_are_for_a_second() -> None:
    engine = open_engine("rate:iops=200,bytes=1K|memory:1M")

    assert (engine.lower._each_s, engine.lower._byte_s) == (1 / 200, 1 / 1024)


def test_a_rate_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs iops=N or bytes=SIZE"):
        open_engine("rate|memory:1M")
