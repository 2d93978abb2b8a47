# SPDX-License-Identifier: Apache-2.0
"""``delay``: slower storage, by a fixed time for each kind of operation."""

import time
from collections.abc import Callable, Mapping

from xvd.engines.delayed import DelayedChannel, can_delay
from xvd.engines.interface import Channel, Engine
from xvd.engines.layers.base import OPERATIONS, Asked, Layer, LayerKind
from xvd.engines.text import parse_time


class Delay(Layer):
    """Waits before each operation. Times in seconds; `sleep` is replaced by tests and simulator.

    A queue's operations wait side by side in front of compiled storage, as in a device that works
    on many at once, and one after the other in front of any other.
    """

    def __init__(
        self,
        lower: Engine,
        *,
        read_s: float = 0.0,
        write_s: float = 0.0,
        flush_s: float = 0.0,
        discard_s: float = 0.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(lower)
        self._times_s = (read_s, write_s, flush_s, discard_s)  # by EngineOp
        self._sleep = sleep

    def perform(self, asked: Asked, do: Callable[[], None]) -> None:
        """Wait, then do it."""
        self._sleep(self._times_s[asked.op])
        do()

    def open_channel(self) -> Channel:
        """A compiled channel where the engine behind has one."""
        if self._sleep is time.sleep:
            channel = self.lower.open_channel()
            if can_delay(channel):
                return DelayedChannel(channel, self._times_s)
            channel.close()
        return super().open_channel()


def _make(lower: Engine, options: Mapping[str, str]) -> Engine:
    read_s, write_s, flush_s, discard_s = (parse_time(options[kind]) for kind in OPERATIONS)
    return Delay(lower, read_s=read_s, write_s=write_s, flush_s=flush_s, discard_s=discard_s)


LAYER = LayerKind(
    "delay", "waits before each operation", "delay:read=1ms", _make, dict.fromkeys(OPERATIONS, "0")
)
