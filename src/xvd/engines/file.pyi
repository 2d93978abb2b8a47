from typing_extensions import disjoint_base

@disjoint_base
class Health:
    @property
    def flush_error(self) -> int: ...
    def flush_failed(self, number: int) -> None: ...

@disjoint_base
class FileChannel:
    def __init__(
        self,
        direct_fd: int,
        cached_fd: int,
        flush_fd: int,
        health: Health,
        *,
        memory_align: int,
        offset_align: int,
        discards: object = None,
    ) -> None: ...
    @property
    def ports(self) -> object: ...
    @property
    def counts(self) -> tuple[int, int]: ...
    def close(self) -> None: ...

def direct_alignment(fd: int) -> tuple[int, int]: ...
def make_zero(fd: int, unmap: bool, offset: int, length: int) -> None: ...
def probe_io_uring() -> str: ...
