# SPDX-License-Identifier: Apache-2.0
"""``rate``: storage that does so many operations and bytes a second, for each queue.

A model of slow storage; what limits a guest is a disk's settings, which hold over all its queues.
"""

import time
from collections.abc import Callable, Mapping

from xvd.engines.delayed import DelayedChannel, can_delay
from xvd.engines.interface import Channel, Engine
from xvd.engines.layers.base import Asked, Layer, LayerKind
from xvd.engines.text import parse_size
from xvd.errors import ConfigError
from xvd.types import EngineOp

_NONE = (0.0, 0.0, 0.0, 0.0)


class Rate(Layer):
    """One operation after the other, each of which takes `each_s` seconds and `byte_s` for each of
    its bytes; flushes take no time."""

    def __init__(
        self,
        lower: Engine,
        *,
        each_s: float = 0.0,
        byte_s: float = 0.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(lower)
        self._each_s = each_s
        self._byte_s = byte_s
        self._sleep = sleep

    def perform(self, asked: Asked, do: Callable[[], None]) -> None:
        """Take the time, then do it."""
        if asked.op is not EngineOp.FLUSH:
            self._sleep(self._each_s + self._byte_s * asked.length)
        do()

    def open_channel(self) -> Channel:
        """A compiled channel where the engine behind has one."""
        if self._sleep is time.sleep:
            channel = self.lower.open_channel()
            if can_delay(channel):
                return DelayedChannel(channel, _NONE, each_s=self._each_s, byte_s=self._byte_s)
            channel.close()
        return super().open_channel()


def _make(lower: Engine, options: Mapping[str, str]) -> Engine:
    rates = {name: parse_size(text) for name, text in options.items()}
    if not any(rates.values()):
        raise ConfigError("the layer rate needs iops=N or bytes=SIZE, for each second")
    each_s, byte_s = (1 / rates[name] if rates[name] else 0.0 for name in ("iops", "bytes"))
    return Rate(lower, each_s=each_s, byte_s=byte_s)


LAYER = LayerKind(
    "rate",
    "does so many operations and bytes a second",
    "rate:iops=500,bytes=50M",
    _make,
    {"iops": "0", "bytes": "0"},
)
