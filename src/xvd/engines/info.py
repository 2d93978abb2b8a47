# SPDX-License-Identifier: Apache-2.0
"""What an engine tells of itself, and what a queue and a queue's thread see of it.

The words of the contract (interface.py) that stand on nothing else.
"""

from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import NamedTuple, Protocol

from xvd.types import RING_SECTOR_SIZE


class ThreadModel(Enum):
    """How many of an engine's calls may run at the same time."""

    SERIAL = "serial"
    """One, over all channels."""
    PARALLEL = "parallel"
    """Any number, also on overlapping ranges: the order of those is nobody's promise."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is; only the size changes while it is open, by `measure` and `resize`.

    size: bytes, a multiple of `logical_block_size`. Block sizes: bytes, powers of two, 512..65536.
    discard_granularity: bytes, 0 if it has no preference. tells_holes: whether `extents` works.
    pins_pages: whether a read that is under way reaches the pages that it was begun with whatever
    is done about them, as direct I/O does.
    """

    size: int
    logical_block_size: int = RING_SECTOR_SIZE
    physical_block_size: int = RING_SECTOR_SIZE
    read_only: bool = False
    can_flush: bool = True
    can_discard: bool = False
    can_secure_discard: bool = False
    discard_granularity: int = 0
    discard_alignment: int = 0
    tells_holes: bool = False
    pins_pages: bool = False
    thread_model: ThreadModel = ThreadModel.SERIAL


@dataclass(frozen=True, slots=True)
class Extent:
    """A part of the storage: bytes, and whether nothing is kept for them and they read as zeros."""

    length: int
    hole: bool


class SnapshotAction(StrEnum):
    """What may be done with a snapshot of storage."""

    CREATE = "create"
    DELETE = "delete"
    REVERT = "revert"


class Snapshot(NamedTuple):
    """A state of the storage that it keeps. created: seconds since 1970."""

    name: str
    created: int


class Channel(Protocol):
    """An engine as one queue sees it; one thread at a time."""

    @property
    def ports(self) -> object:
        """Capsule ``xvd.engine_ports``."""

    def close(self) -> None:
        """Release the engine; nothing may be in flight."""


class Performer(Protocol):
    """The calls that a queue's thread makes; `interface.Engine` says what each one means."""

    @property
    def info(self) -> EngineInfo:
        """Its size, block sizes and abilities."""

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer."""

    def write(self, buffer: memoryview, offset: int) -> None:
        """Store the buffer."""

    def flush(self) -> None:
        """Make all durable."""

    def discard(self, offset: int, length: int) -> None:
        """Forget a range."""

    def secure_discard(self, offset: int, length: int) -> None:
        """Destroy a range."""

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Let a range be zeros."""
