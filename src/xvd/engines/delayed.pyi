from collections.abc import Sequence

from typing_extensions import disjoint_base

from xvd.engines.interface import Channel

def can_delay(channel: Channel) -> bool: ...

@disjoint_base
class DelayedChannel:
    def __init__(
        self,
        lower: Channel,
        delays_s: Sequence[float],
        *,
        each_s: float = 0.0,
        byte_s: float = 0.0,
    ) -> None: ...
    @property
    def ports(self) -> object: ...
    def close(self) -> None: ...
