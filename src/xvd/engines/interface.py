# SPDX-License-Identifier: Apache-2.0
"""The contract of storage: what an engine is, and what may be asked of it when.

An engine is opened once and passed around as a handle. Its life:

    open -> info -> open_channel for each queue -> ... -> close each channel -> close

Bytes move in one of two ways. A compiled engine overrides `open_channel` and is called by the
queue's thread without the GIL (dataplane/ports.pxd, `engine_ports`). Any other engine implements
the four calls below in Python, and `open_channel` puts a worker thread between it and the queue:
slower, the same to everybody else. A layer is an engine in front of another.

Calls arrive checked (checked.py): inside the size, whole logical blocks, no writes if read-only.
An engine raises OSError with an errno; that one request fails and nothing else. EOPNOTSUPP from a
flush or a discard says that it cannot do them at all: the guest is told not to ask again.

What `write` has accepted need not be durable; what was accepted before `flush` returned must be.
"""

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from xvd.engines.bridge import ThreadedChannel
from xvd.engines.info import Channel, EngineInfo, Extent, Snapshot, SnapshotAction, ThreadModel
from xvd.errors import EngineError

__all__ = [
    "Channel",
    "Engine",
    "EngineInfo",
    "Extent",
    "Opening",
    "Scheme",
    "Snapshot",
    "SnapshotAction",
    "ThreadModel",
    "describe",
]


_NO_SNAPSHOTS: Final = (
    "the storage keeps no snapshots; qcow2 and rbd do: xvd mirror DOMID VDEV qcow2:PATH --pivot"
)


class Engine(ABC):
    """Storage. Subclass it and implement `read`, `write` and what `info` promises."""

    @property
    @abstractmethod
    def info(self) -> EngineInfo:
        """Its size, block sizes and abilities."""

    @property
    def identity(self) -> str:
        """One line that tells this storage from any other, to a later process too; empty where
        nothing is lost if it is another."""
        return ""

    @property
    def trouble(self) -> str:
        """The lasting fault of the storage, and the remedy; empty while there is none."""
        return ""

    @abstractmethod
    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill the whole buffer from `offset` bytes on."""

    @abstractmethod
    def write(self, buffer: memoryview, offset: int) -> None:
        """Store the whole buffer from `offset` bytes on."""

    def flush(self) -> None:  # noqa: B027
        """Make everything accepted so far durable."""

    def discard(self, offset: int, length: int) -> None:  # noqa: B027
        """Forget a range: afterwards it reads as anything. Called only if `info.can_discard`."""

    def secure_discard(self, offset: int, length: int) -> None:
        """Destroy a range: nobody reads it again. Called only if `info.can_secure_discard`."""
        raise EngineError(errno.EOPNOTSUPP, "the storage cannot erase securely")

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Let a range read as zeros without writing any; with `unmap` without space for them.

        Raises `EngineError` (EOPNOTSUPP) where that cannot be had: write them then.
        """
        raise EngineError(errno.EOPNOTSUPP, "the storage has no zeros but those that are written")

    def extents(self, offset: int, length: int, most: int) -> list[Extent]:
        """Tell where a range has data, as its first parts in their order, at most `most` of them.

        What any write that has returned left there is seen. Called only if `info.tells_holes`.
        """
        raise EngineError(errno.EOPNOTSUPP, "the storage does not tell where it has data")

    def measure(self) -> int:
        """Measure the storage again: its bytes now. `info` and every channel go by them then."""
        return self.info.size

    def resize(self, size: int) -> None:
        """Make the storage `size` bytes, whole logical blocks; `measure` is due afterwards."""
        raise EngineError(errno.EOPNOTSUPP, "this storage has the size that it has")

    def snapshots(self) -> list[Snapshot]:
        """Tell what states of the storage it keeps, oldest first. Raises `EngineError` where it
        keeps none."""
        raise EngineError(errno.EOPNOTSUPP, _NO_SNAPSHOTS)

    def snapshot(self, action: SnapshotAction, name: str) -> None:
        """Create, delete or go back to the state of this name, durably; only while nothing is in
        flight. `measure` is due afterwards. Raises as `snapshots` does."""
        raise EngineError(errno.EOPNOTSUPP, _NO_SNAPSHOTS)

    def accept_size(self) -> None:  # noqa: B027
        """The storage is smaller than it was, and may be: nothing is missing any more."""

    def close(self) -> None:  # noqa: B027
        """Give everything back. Idempotent."""

    def open_channel(self) -> Channel:
        """Open one queue's way in; see the module's text."""
        return ThreadedChannel(self)


@dataclass(frozen=True, slots=True)
class Opening:
    """How storage is opened, whatever it is.

    read_only: an engine that cannot gets a layer that refuses writes. patience_s: how long to wait
    for a lock. user: whose disk it is, for the words to another one that wants the same image.
    device_model: a QEMU of the same guest has the image open as well.
    """

    read_only: bool = False
    patience_s: float = 0.0
    user: str = ""
    device_model: bool = False


class Scheme(NamedTuple):
    """A URI scheme of an engine: its file lists those that it has as `SCHEMES`.

    form: how such a URI is written. help: what is then served. open: the text after the colon, and
    how -> an engine; it raises `ConfigError` for a text that makes no sense. files: that text ->
    the files that are then opened; None: it takes programs, or a network.
    """

    name: str
    form: str
    help: str
    open: Callable[[str, Opening], Engine]
    files: Callable[[str], tuple[str, ...]] | None = None


def no_files(_: str) -> tuple[str, ...]:
    """Name the files of storage that has none."""
    return ()


def describe(engine: Engine) -> dict[str, object]:
    """An engine's info by name, for people and JSON."""
    info = engine.info
    return {
        "engine": type(engine).__name__,
        "size": info.size,
        "logical_block_size": info.logical_block_size,
        "physical_block_size": info.physical_block_size,
        "read_only": info.read_only,
        "can_flush": info.can_flush,
        "can_discard": info.can_discard,
        "can_secure_discard": info.can_secure_discard,
    }
