# SPDX-License-Identifier: Apache-2.0
"""Storage under the scheduler's hand: what is submitted waits until its outcome is drawn.

What was written lies in a cache until a flush has ended: `power_lost` takes any of it back, sector
by sector. The disk grows and shrinks; what is cut off is zero when it comes back.
"""

import errno
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from xvd.engines.bridge import BridgeChannel, Operation
from xvd.engines.info import Channel
from xvd.engines.memory import MemoryEngine
from xvd.errors import EngineError
from xvd.sim.checkers import SECTOR
from xvd.sim.prng import Prng

MISSING = "the simulated storage is not there"
"""Why it cannot be opened."""


class Work(Protocol):
    """What is done to storage: a queue's operation, or a call. kind: as of an `Operation`."""

    @property
    def kind(self) -> str:
        """Name what to do."""

    @property
    def offset(self) -> int:
        """Return the first byte."""

    @property
    def length(self) -> int:
        """Return how many bytes."""

    def buffers(self) -> list[memoryview]:
        """Return the data, in parts."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call of an engine's own: what copies a disk makes them. data: None for what has none."""

    kind: str
    offset: int = 0
    length: int = 0
    data: memoryview | None = None

    def buffers(self) -> list[memoryview]:
        """Return the data, in one part."""
        return [] if self.data is None else [self.data]


class _Held(NamedTuple):
    channel: BridgeChannel
    operation: Operation


class SimStorage:
    """A memory engine behind bridges; operations end in any order, now and then with an error.

    sectors: its size now; sectors_max: the largest that it will have.
    """

    def __init__(self, prng: Prng, sectors: int, sectors_max: int) -> None:
        self.sectors = sectors
        self.missing = False
        """Whether it cannot be opened now; who has it open has it."""
        self._prng = prng
        self._engine = MemoryEngine(sectors_max * SECTOR)
        self._channels: list[BridgeChannel] = []
        self._held: list[_Held] = []
        self._left: list[Channel] = []
        self._hanging: list[Channel] = []
        self._on_medium: dict[int, bytes] = {}
        """Of each sector that the cache holds another content of."""

    def open(self) -> None:
        """Raise `EngineError` if it cannot be opened."""
        if self.missing:
            raise EngineError(errno.ENOENT, MISSING)

    def fill(self, byte: int) -> None:
        """Let every byte of it be this."""
        self._engine.view[:] = bytes([byte]) * len(self._engine.view)

    def content(self, size: int) -> bytes:
        """Return its first bytes, as whoever opens it would read them now."""
        return bytes(self._engine.view[:size])

    @property
    def is_used(self) -> bool:
        """Whether a queue has a way in."""
        return bool(self._channels)

    def call(self, work: Call, error_one_in: int) -> None:
        """Do it at once, or fail now and then and have done a part. Raises `EngineError`."""
        if not self._inside(work):
            raise EngineError(errno.EINVAL, f"{work.kind} behind the end")
        if self._prng.chance(error_one_in):
            self._apply(work, partly=True)
            raise EngineError(errno.EIO, f"{work.kind} fails")
        self.perform(work)

    def open_channel(self) -> BridgeChannel:
        """A queue's way in."""
        self._channels.append(BridgeChannel())
        return self._channels[-1]

    @property
    def held(self) -> int:
        """Operations that may end now, after taking in what is new."""
        return len(self._free())

    def _free(self) -> "list[_Held]":
        for channel in self._channels:
            self._held += [_Held(channel, operation) for operation in channel.take()]
        return [one for one in self._held if one.channel not in self._hanging]

    @property
    def hangs(self) -> bool:
        """Whether nothing ends that the disk has asked for."""
        return any(channel not in self._left for channel in self._hanging)

    def hang(self) -> None:
        """Let nothing end by the ways in that there are, until `revive`."""
        self._hanging = list(self._channels)

    def revive(self) -> None:
        """Let everything end again."""
        self._hanging.clear()

    def leave(self, channel: Channel) -> None:
        """Let what came by this be another storage's from now on: it changes nothing here, and what
        is read is of no use to anybody."""
        if channel in self._channels:
            self._left.append(channel)

    def finish_one(self, error_one_in: int) -> str:
        """End one of the held operations; what was done, for the trace."""
        one = self._prng.choose(self._free())
        self._held.remove(one)
        channel, operation = one
        if channel in self._left:
            return _end_late(operation)
        if not self._inside(operation):
            operation.complete(errno.EINVAL)
            return f"{operation.kind} refused"
        if self._prng.chance(error_one_in):
            self._apply(operation, partly=True)
            operation.complete(errno.EIO)
            return f"{operation.kind} fails"
        self.perform(operation)
        operation.complete()
        return f"{operation.kind} done"

    def perform(self, operation: Work) -> None:
        """Do all of an operation."""
        self._apply(operation, partly=False)
        if operation.kind == "flush":
            self._on_medium.clear()

    def resize(self, sectors: int) -> None:
        """Cut off the end, or append zeros."""
        low, high = sorted((self.sectors, sectors))
        self._engine.discard(low * SECTOR, (high - low) * SECTOR)
        for sector in range(low, high):
            self._on_medium.pop(sector, None)
        self.sectors = sectors

    def backend_died(self) -> None:
        """Let what was under way happen, or not, or in part; a successor begins after that."""
        self._hanging.clear()
        for channel, operation in self._free():
            if channel not in self._left and self._inside(operation) and self._prng.chance(2):
                self._apply(operation, partly=self._prng.chance(2))
        self._held.clear()
        self._channels.clear()
        self._left.clear()

    def power_lost(self) -> None:
        """After `backend_died`: of what no flush covers, each sector is as it was, or is not."""
        for sector, data in self._on_medium.items():
            if self._prng.chance(2):
                self._engine.write(memoryview(data), sector * SECTOR)
        self._on_medium.clear()

    def _inside(self, operation: Work) -> bool:
        return operation.offset + operation.length <= self.sectors * SECTOR

    def _remember(self, operation: Work) -> None:
        first = operation.offset // SECTOR
        for sector in range(first, first + operation.length // SECTOR):
            if sector not in self._on_medium:
                at = sector * SECTOR
                self._on_medium[sector] = bytes(self._engine.view[at : at + SECTOR])

    def _apply(self, operation: Work, *, partly: bool) -> None:
        """Do an operation, or a part of it: whole sectors in any number."""
        if operation.kind == "flush":
            return
        if operation.kind == "discard":
            if operation.length:
                self._remember(operation)
                self._engine.discard(operation.offset, operation.length)
            return
        if operation.kind == "write":
            self._remember(operation)
        at = operation.offset
        sectors = operation.length // SECTOR
        left = self._prng.below(sectors + 1) * SECTOR if partly else operation.length
        for buffer in operation.buffers():
            part = buffer[:left]
            if operation.kind == "read":
                self._engine.read(part, at)
            else:
                self._engine.write(part, at)
            at += len(part)
            left -= len(part)


def _end_late(operation: Operation) -> str:
    """End an operation that nobody waits for any more, with nonsense for who would believe it."""
    if operation.kind == "read":
        for buffer in operation.buffers():
            buffer[:] = b"\xee" * len(buffer)
    operation.complete()
    return f"{operation.kind} too late"
