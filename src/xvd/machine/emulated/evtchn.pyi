from collections.abc import Callable

from typing_extensions import disjoint_base

from xvd.machine.emulated.shared import DomainState
from xvd.types import Port

@disjoint_base
class EmulatedEventChannel:
    def __init__(
        self,
        own: DomainState,
        peer: DomainState,
        port: Port,
        fd: int,
        peer_fd: int,
        release: Callable[[Port], None],
    ) -> None: ...
    @property
    def port(self) -> Port: ...
    @property
    def ports(self) -> object: ...
    @property
    def bound(self) -> bool: ...
    @property
    def sent(self) -> int: ...
    def fileno(self) -> int: ...
    def notify(self) -> None: ...
    def consume(self) -> bool: ...
    def close(self) -> None: ...
