# SPDX-License-Identifier: Apache-2.0
"""The simulated storage as an engine, as a backend opens it."""

from collections.abc import Callable

from xvd.engines.info import Channel, EngineInfo
from xvd.engines.interface import Engine
from xvd.sim.checkers import SECTOR
from xvd.sim.storage import SimStorage


class SimEngine(Engine):
    """One opening of the storage. resized: called with the sectors that the storage has then."""

    def __init__(self, storage: SimStorage, resized: Callable[[int], None]) -> None:
        self._storage = storage
        self._resized = resized

    @property
    def info(self) -> EngineInfo:
        """See `Engine.info`."""
        size = self._storage.sectors * SECTOR
        return EngineInfo(size=size, can_discard=True)

    @property
    def identity(self) -> str:
        """There is one."""
        return "sim"

    def read(self, buffer: memoryview, offset: int) -> None:
        """Not called: the queues have channels of their own."""
        raise NotImplementedError

    def write(self, buffer: memoryview, offset: int) -> None:
        """Not called: the queues have channels of their own."""
        raise NotImplementedError

    def resize(self, size: int) -> None:
        """See `Engine.resize`."""
        self._resized(size // SECTOR)

    def open_channel(self) -> Channel:
        """See `Engine.open_channel`."""
        return self._storage.open_channel()
