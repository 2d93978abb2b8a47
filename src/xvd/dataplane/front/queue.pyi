from typing_extensions import Buffer, disjoint_base

from xvd.dataplane.types import HasPorts

@disjoint_base
class FrontQueue:
    def __init__(
        self,
        ring: Buffer,
        nr_ents: int,
        abi: int,
        pages: HasPorts,
        events: HasPorts,
        *,
        handle: int = 0,
        segments_max: int = 11,
        block_sectors: int = 1,
        wire_sector: int = 1,
        page_grants: int = 1,
        persistent: bool = False,
        trusted: bool = True,
    ) -> None: ...
    @staticmethod
    def pages_needed(segments_max: int, page_grants: int = 1) -> int: ...
    @property
    def ports(self) -> object: ...
    def submit(
        self,
        operation: int,
        sector_number: int,
        nr_sectors: int,
        buffer: Buffer | None,
        token: int,
        *,
        flag: int = 0,
    ) -> bool: ...
    def reap(self) -> list[tuple[int, int]]: ...
    def step(self, budget: int = 64) -> int: ...
    def may_sleep(self) -> bool: ...
    def stop(self) -> None: ...
    def scan(self) -> None: ...
    @property
    def barrier_sectors_max(self) -> int: ...
    @property
    def done_fd(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def breach(self) -> str | None: ...
    def counters(self) -> dict[str, int]: ...
    def latency(self) -> dict[str, list[int]]: ...
