# SPDX-License-Identifier: Apache-2.0
"""A disk for programs: `Disk` with an event loop, `SyncDisk` without one; either joins a guest.

What a disk can do is the frontend's (frontend/operations.py); here it gets the way to a domain.
"""

import contextlib
import os
from collections.abc import Coroutine, Generator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from xvd import joining
from xvd.blkif.vdev import vdev_number
from xvd.frontend import disk as frontend
from xvd.frontend import sync
from xvd.frontend.settings import Settings
from xvd.types import Domid

D = TypeVar("D", bound="Disk")


class Connecting(Generic[D]):
    """A disk on its way: ``await`` it for the disk, or close the disk by ``async with``."""

    def __init__(self, work: Coroutine[Any, Any, D]) -> None:
        self._work = work
        self._disk: D | None = None

    def __await__(self) -> Generator[Any, None, D]:
        return self._work.__await__()

    async def __aenter__(self) -> D:
        self._disk = await self._work
        return self._disk

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._disk is not None:
            await self._disk.close()


class Disk(frontend.Disk):
    """One disk of a guest, whose frontend this process is; for code with an event loop.

    Offsets and lengths are bytes, of any alignment, within 0..`size`. Operations that are awaited
    together are in flight together. They outlive a backend that is restarted: their callers see a
    delay. Everything is called in the event loop's thread.

    Errors are OSErrors: EINVAL for what is not on the disk, EROFS for writing to a read-only one,
    EIO and EOPNOTSUPP as the backend says, ENODEV when the disk has gone for good (`gone` is set
    then).
    """

    _behind: contextlib.AsyncExitStack | None = None

    @classmethod
    def connect(
        cls,
        host: str | os.PathLike[str] | None = None,
        *,
        domid: int | None = None,
        vdev: str | int,
        settings: Settings | None = None,
    ) -> Connecting[Self]:
        """Become the frontend of a guest's disk: ``async with Disk.connect(...) as disk:``.

        host: the directory of an emulated host (``xvd host DIR``); without one, the real Xen domain
        that this process runs in, in the place of its xen-blkfront. domid: the guest, which must be
        this domain on real Xen. vdev: the disk's name or number, ``xvda`` or 51712. settings: as of
        ``xvd nbd --set``.

        Waits for the backend as long as there is one to wait for. Raises `ConfigError` if there is
        no such disk or no Xen, `PeerClosed` if no host answers, `DiskInUse` if the disk has a
        frontend already, OSError (ENODEV) or another `XvdError` where there is no backend.
        """
        return Connecting(cls._connected(host, domid, vdev, settings))

    @classmethod
    async def _connected(
        cls,
        host: str | os.PathLike[str] | None,
        domid: int | None,
        vdev: str | int,
        settings: Settings | None,
    ) -> Self:
        number = vdev_number(str(vdev))
        async with contextlib.AsyncExitStack() as stack:
            guest = None if domid is None else Domid(domid)
            machine, _ = await joining.open_machine(host, guest)
            stack.callback(machine.close)
            store = await machine.xenstore()
            stack.push_async_callback(store.close)
            await joining.demand_disk(store, machine.domid, number)
            disk = await cls.open(machine, store, f"device/vbd/{number}", settings=settings)
            disk._behind = stack.pop_all()
        return disk

    async def close(self, timeout_s: float | None = None) -> None:
        """Finish what is outstanding, give the disk back to the next driver. Idempotent.

        A backend that takes longer than `timeout_s` seconds is left as by a process that dies:
        what it has not answered fails, and the next driver begins with a reset. None: waits.
        """
        try:
            await super().close(timeout_s)
        finally:
            behind, self._behind = self._behind, None
            if behind is not None:
                await behind.aclose()


class SyncDisk(sync.SyncDisk):
    """The same for code without an event loop: each call waits for its operation.

    Any number of threads may use one; each call blocks its own thread only. Offsets, lengths and
    errors are those of `Disk`.
    """

    @classmethod
    def connect(
        cls,
        host: str | os.PathLike[str] | None = None,
        *,
        domid: int | None = None,
        vdev: str | int,
        settings: Settings | None = None,
    ) -> Self:
        """Become the frontend of a guest's disk: ``with SyncDisk.connect(...) as disk:``.

        The arguments and errors are those of `Disk.connect`.
        """

        async def connect() -> Disk:
            return await Disk.connect(host, domid=domid, vdev=vdev, settings=settings)

        return cls(connect)

    @property
    def disk(self) -> Disk:
        """The `Disk` behind, for what it is; its operations belong to its own thread."""
        found = super().disk
        assert isinstance(found, Disk)
        return found
