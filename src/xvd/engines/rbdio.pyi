from collections.abc import Sequence

from typing_extensions import disjoint_base

CALLS: tuple[str, ...]
ZEROES_CALL: str

@disjoint_base
class RbdChannel:
    def __new__(cls, image: int, addresses: Sequence[int]) -> RbdChannel: ...
    @property
    def ports(self) -> object: ...
    def close(self) -> None: ...
