# SPDX-License-Identifier: Apache-2.0
"""A RADOS block device as storage: ``rbd:POOL/IMAGE[@SNAP][,id=USER]...``.

Who writes to an image holds its exclusive lock, so nobody else does. A cluster that is away is
waited for, by librbd: a guest sees a delay.
"""

import ctypes
import dataclasses
import threading
from typing import Final

from xvd.engines.info import Snapshot, SnapshotAction
from xvd.engines.interface import Channel, Engine, EngineInfo, ThreadModel
from xvd.engines.rbd.library import Image, Where, addresses
from xvd.engines.rbd.lock import take_lock
from xvd.engines.rbdio import RbdChannel
from xvd.types import RING_SECTOR_SIZE

_BLOCK: Final = 4096
_CALLS: Final = {
    SnapshotAction.CREATE: "snap_create",
    SnapshotAction.DELETE: "snap_remove",
    SnapshotAction.REVERT: "snap_rollback",
}


class RbdEngine(Engine):
    """An image, open. Raises `EngineError`; EBUSY where somebody else writes to it, after waiting
    for `patience_s`."""

    def __init__(self, where: Where, *, read_only: bool, patience_s: float = 0.0) -> None:
        read_only = read_only or bool(where.snapshot)
        self._image = Image(where, read_only=read_only)
        self._mutex = threading.Lock()
        self._closed = False
        try:
            if not read_only:
                take_lock(self._image, str(where), patience_s)
            self._identity = self._image.identity
            self._info = EngineInfo(
                size=self._whole_sectors(),
                physical_block_size=_BLOCK,
                read_only=read_only,
                can_discard=not read_only,
                discard_granularity=self._image.object_size,
                thread_model=ThreadModel.PARALLEL,
            )
        except BaseException:
            self.close()
            raise

    def _whole_sectors(self) -> int:
        size = self._image.size
        return size - size % RING_SECTOR_SIZE

    @property
    def info(self) -> EngineInfo:
        """Return what the cluster says of it."""
        return self._info

    @property
    def identity(self) -> str:
        """The image's own number, and its cluster's."""
        return self._identity

    def read(self, buffer: memoryview, offset: int) -> None:
        """Read, and wait for that; queues have channels."""
        self._image.call("read", *_range(offset, buffer.nbytes), _address(buffer))

    def write(self, buffer: memoryview, offset: int) -> None:
        """Write, and wait for that."""
        self._image.call("write", *_range(offset, buffer.nbytes), _address(buffer))

    def flush(self) -> None:
        """Flush."""
        self._image.call("flush")

    def discard(self, offset: int, length: int) -> None:
        """Discard."""
        self._image.call("discard", *_range(offset, length))

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Let whole objects be gone where that is wanted."""
        thick = 0 if unmap else 1  # RBD_WRITE_ZEROES_FLAG_THICK_PROVISION
        self._image.call("write_zeroes", *_range(offset, length), thick, 0)

    def measure(self) -> int:
        """Ask librbd, which the cluster tells of every change."""
        size = self._whole_sectors()
        if size != self._info.size:
            self._info = dataclasses.replace(self._info, size=size)
        return size

    def resize(self, size: int) -> None:
        """Resize the image."""
        self._image.call("resize", ctypes.c_uint64(size))

    def snapshots(self) -> list[Snapshot]:
        """List those of the image."""
        return [Snapshot(*one) for one in self._image.snapshots()]

    def snapshot(self, action: SnapshotAction, name: str) -> None:
        """Let the cluster do it."""
        self._image.call(_CALLS[action], name.encode())

    def open_channel(self) -> Channel:
        """A compiled channel."""
        return RbdChannel(self._image.handle.value or 0, addresses())

    def close(self) -> None:
        """Give the lock and the image back. Idempotent."""
        with self._mutex:
            closed, self._closed = self._closed, True
        if not closed:
            self._image.close()


def _range(offset: int, length: int) -> tuple[ctypes.c_uint64, ctypes.c_uint64]:
    return ctypes.c_uint64(offset), ctypes.c_uint64(length)


def _address(buffer: memoryview) -> ctypes.c_void_p | bytes:
    if buffer.readonly:  # such memory ctypes does not show
        return bytes(buffer)
    return ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(buffer)))
