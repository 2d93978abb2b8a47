from typing_extensions import disjoint_base

from xvd.dataplane.front.queue import FrontQueue

@disjoint_base
class Load:
    def __init__(
        self,
        queue: FrontQueue,
        *,
        depth: int,
        size: int,
        span: int,
        operations: int,
        write_percent: int = 0,
        seed: int = 1,
        sequential: bool = False,
        first: int = 0,
        verify: int = 0,
        in_place: bool = False,
    ) -> None: ...
    @property
    def ports(self) -> object: ...
    def step(self, budget: int = 64) -> int: ...
    def stop(self) -> None: ...
    @property
    def result(self) -> tuple[int, int, int]: ...
    @property
    def times(self) -> tuple[int, int, int]: ...
