from typing_extensions import disjoint_base

from xvd.engines.interface import Channel, EngineInfo

@disjoint_base
class CheckedChannel:
    def __init__(self, lower: Channel, info: EngineInfo) -> None: ...
    @property
    def ports(self) -> object: ...
    def close(self) -> None: ...
