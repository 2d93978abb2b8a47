# SPDX-License-Identifier: Apache-2.0
"""One guest in two domains: while it migrates to its own host, both have the same disk.

The toolstack gives the new domain its disks before it detaches the old one's, whose virtual CPUs
stand still by then. An image is locked against everybody else, so the two share one engine.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass

from xvd.backend.device import StorageOpener
from xvd.blkif.assignment import BackendAssignment
from xvd.engines.interface import (
    Channel,
    Engine,
    EngineInfo,
    Extent,
    Snapshot,
    SnapshotAction,
)
from xvd.errors import XenstoreError
from xvd.machine.xs.client import XenstoreClient


@dataclass(slots=True)
class _Shared:
    opening: asyncio.Future[Engine]
    users: int = 0


class SharedStorage:
    """A `StorageOpener` around another: it opens a guest's disk once for all of its domains.

    Which guest a domain is says its ``vm`` node, which a guest cannot write. To be called in the
    event loop's thread; what it returns is closed in any.
    """

    def __init__(self, open_storage: StorageOpener, store: XenstoreClient) -> None:
        self._open = open_storage
        self._store = store
        self._mutex = threading.Lock()
        self._shared: dict[tuple[object, ...], _Shared] = {}

    async def __call__(self, assignment: BackendAssignment) -> Engine:
        """Open the storage, or share what is open. Raises what the other opener raises."""
        guest = None
        with contextlib.suppress(XenstoreError):
            guest = await self._store.try_read(f"/local/domain/{assignment.frontend_domid}/vm")
        if not guest:
            return await self._open(assignment)
        vdev = assignment.frontend.rpartition("/")[2]
        key = (guest, vdev, assignment.image_format, assignment.image, assignment.writable)
        with self._mutex:
            shared = self._shared.get(key)
            if shared is None:
                opening = asyncio.ensure_future(self._open(assignment))
                shared = self._shared[key] = _Shared(opening)
            shared.users += 1
        try:
            engine = await asyncio.shield(shared.opening)
        except BaseException:
            self._leave(key, shared)
            raise

        def give_back() -> None:
            if self._leave(key, shared):
                engine.close()

        return _Lease(engine, give_back)

    def _leave(self, key: tuple[object, ...], shared: _Shared) -> bool:
        """Count one user less; True for the last."""
        with self._mutex:
            shared.users -= 1
            if shared.users == 0:
                del self._shared[key]
            return shared.users == 0


class _Lease(Engine):
    """An engine that somebody else may have too."""

    def __init__(self, engine: Engine, give_back: Callable[[], None]) -> None:
        self._engine = engine
        self._give_back: Callable[[], None] | None = give_back

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    @property
    def identity(self) -> str:
        return self._engine.identity

    def read(self, buffer: memoryview, offset: int) -> None:
        self._engine.read(buffer, offset)

    def write(self, buffer: memoryview, offset: int) -> None:
        self._engine.write(buffer, offset)

    def flush(self) -> None:
        self._engine.flush()

    def discard(self, offset: int, length: int) -> None:
        self._engine.discard(offset, length)

    def secure_discard(self, offset: int, length: int) -> None:
        self._engine.secure_discard(offset, length)

    @property
    def trouble(self) -> str:
        return self._engine.trouble

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self._engine.write_zeroes(offset, length, unmap=unmap)

    def extents(self, offset: int, length: int, most: int) -> list[Extent]:
        return self._engine.extents(offset, length, most)

    def measure(self) -> int:
        return self._engine.measure()

    def snapshots(self) -> list[Snapshot]:
        return self._engine.snapshots()

    def snapshot(self, action: SnapshotAction, name: str) -> None:
        self._engine.snapshot(action, name)

    def accept_size(self) -> None:
        self._engine.accept_size()

    def resize(self, size: int) -> None:
        self._engine.resize(size)

    def open_channel(self) -> Channel:
        return self._engine.open_channel()

    def close(self) -> None:
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()
