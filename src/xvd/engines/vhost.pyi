from typing import Final

from typing_extensions import Buffer, disjoint_base

AREA_BYTES: Final[int]
RING_ENTRIES: Final[int]
LAYOUT: Final[tuple[int, int, int]]

@disjoint_base
class Writes: ...

@disjoint_base
class VhostChannel:
    def __init__(
        self,
        memory: Buffer,
        offset: int,
        address: int,
        writes: Writes,
        *,
        discard_bytes: int,
        zeroes_bytes: int,
    ) -> None: ...
    @property
    def ports(self) -> object: ...
    @property
    def kick_fd(self) -> int: ...
    @property
    def call_fd(self) -> int: ...
    def perform(
        self, op: int, offset: int, data: Buffer | int, dead_fd: int = -1, *, unmap: bool = False
    ) -> int: ...
    def halt(self) -> None: ...
    def go(self) -> None: ...
    def unflushed(self) -> list[tuple[int, int, int, int, bytes]]: ...
    def forget_unflushed(self) -> None: ...
    def close(self) -> None: ...
