from typing_extensions import Buffer

from xvd.dataplane.types import HasPorts

class BackendQueue:
    def __init__(
        self,
        ring: Buffer,
        nr_ents: int,
        abi: int,
        grants: HasPorts,
        events: HasPorts,
        engine: HasPorts,
        *,
        capacity: int,
        logical_sectors: int = 1,
        read_only: bool = False,
        offered: int = 0x3,
        copying: bool = False,
    ) -> None: ...
    @property
    def ports(self) -> object: ...
    def step(self, budget: int = 64) -> int: ...
    def may_sleep(self) -> bool: ...
    def stop(self) -> None: ...
    def set_capacity(self, sectors: int) -> None: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def broken(self) -> bool: ...
    def counters(self) -> dict[str, object]: ...
