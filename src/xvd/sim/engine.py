# SPDX-License-Identifier: Apache-2.0
"""The simulated storage as an engine, as a backend opens it."""

from collections.abc import Callable

from xvd.engines.info import Channel, EngineInfo
from xvd.engines.interface import Engine
from xvd.sim.checkers import SECTOR
from xvd.sim.storage import Call, SimStorage


class SimEngine(Engine):
    """One opening of the storage. name: of it. resized: called with the storage and the sectors
    that it is to have. meanwhile: called before each call of our own, as of what copies a disk, for
    others to go on; one in how many calls fails then.
    """

    def __init__(
        self,
        storage: SimStorage,
        name: str,
        resized: Callable[[SimStorage, int], None],
        meanwhile: Callable[[], int],
    ) -> None:
        self._storage = storage
        self._name = name
        self._resized = resized
        self._meanwhile = meanwhile

    @property
    def info(self) -> EngineInfo:
        """See `Engine.info`."""
        size = self._storage.sectors * SECTOR
        return EngineInfo(size=size, can_discard=True)

    @property
    def identity(self) -> str:
        """One for each storage."""
        return f"sim {self._name}"

    def read(self, buffer: memoryview, offset: int) -> None:
        """See `Engine.read`."""
        self._call(Call("read", offset, buffer.nbytes, buffer))

    def write(self, buffer: memoryview, offset: int) -> None:
        """See `Engine.write`."""
        self._call(Call("write", offset, buffer.nbytes, buffer))

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """See `Engine.write_zeroes`."""
        del unmap  # it keeps no space
        self._call(Call("discard", offset, length))

    def flush(self) -> None:
        """See `Engine.flush`."""
        self._call(Call("flush"))

    def _call(self, work: Call) -> None:
        self._storage.call(work, self._meanwhile())

    def resize(self, size: int) -> None:
        """See `Engine.resize`."""
        self._resized(self._storage, size // SECTOR)

    def open_channel(self) -> Channel:
        """See `Engine.open_channel`."""
        return self._storage.open_channel()
