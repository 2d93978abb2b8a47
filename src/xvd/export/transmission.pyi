from typing import Final

from typing_extensions import Buffer, disjoint_base

from xvd.export.memory import ExportMemory

_Request = tuple[int, int, int, int, int, int, int, bytes | None]

@disjoint_base
class Transmission:
    OVER: Final[int]
    MALFORMED: Final[int]
    GONE: Final[int]
    EOF: Final[int]
    LEFT: Final[int]
    def __new__(
        cls,
        fd: int,
        *,
        structured: bool,
        requests_max: int,
        bytes_max: int,
        payload_max: int,
        memory: ExportMemory,
        received: Buffer = b"",
    ) -> Transmission: ...
    @property
    def ports(self) -> object: ...
    @property
    def bell(self) -> int: ...
    def take(self) -> tuple[int, list[_Request]]: ...
    def answer(self, number: int, *parts: Buffer) -> bool: ...
    def finish(self) -> None: ...
    def cut(self) -> None: ...
    def close(self) -> None: ...
    @property
    def in_progress(self) -> int: ...
    @property
    def held(self) -> int: ...
    @property
    def idle_s(self) -> float: ...
    @property
    def awaits_client(self) -> bool: ...
    def counters(self) -> dict[str, int]: ...
