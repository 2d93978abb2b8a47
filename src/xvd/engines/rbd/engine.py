# SPDX-License-Identifier: Apache-2.0
"""A RADOS block device as storage: ``rbd:POOL/IMAGE[@SNAP][,id=USER][,conf=FILE]``.

Who writes to an image holds its exclusive lock, so nobody else does. A cluster that is away is
waited for, by librbd: a guest sees a delay.
"""

import ctypes
import dataclasses
import errno
import threading
import time
from typing import Final

from xvd.engines.info import Snapshot, SnapshotAction
from xvd.engines.interface import Channel, Engine, EngineInfo, ThreadModel
from xvd.engines.rbd.library import EXCLUSIVE, Image, Where, addresses
from xvd.engines.rbdio import RbdChannel
from xvd.errors import EngineError
from xvd.types import RING_SECTOR_SIZE

_LOCKED_S: Final = 0.2
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
        self._where = where
        self._image = Image(where, read_only=read_only)
        self._mutex = threading.Lock()
        self._closed = False
        try:
            if not read_only:
                self._lock(patience_s)
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

    def _lock(self, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        while True:
            try:
                self._image.call("lock_acquire", EXCLUSIVE)
                return
            except EngineError as error:
                if error.errno == errno.EINVAL:
                    text = f"{self._where} has no lock: rbd feature enable IMAGE exclusive-lock"
                    raise EngineError(errno.EINVAL, text) from None
                if error.errno not in (errno.EBUSY, errno.EROFS):
                    raise
                if time.monotonic() >= deadline:
                    raise EngineError(errno.EBUSY, f"{self._where} is in use") from None
            time.sleep(_LOCKED_S)

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
