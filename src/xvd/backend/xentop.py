# SPDX-License-Identifier: Apache-2.0
"""A disk's figures where xentop looks for them: tapdisk's page of shared memory.

libxenstat asks the node ``kthread-pid`` of a ``vbd3`` disk for a process, and reads
``/dev/shm/td3-PID/vbd-DOM-VDEV`` (Xen: tools/libs/stat/xenstat_linux.c, read_attributes_vbd3).
"""

import asyncio
import contextlib
import logging
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

from xvd.backend.counters import BackCounters
from xvd.errors import ConfigError, describe
from xvd.files import create_own, open_own_directory, own_directory, remove
from xvd.machine.xs.client import XenstoreClient
from xvd.xenbus.directory import change_device

logger = logging.getLogger(__name__)

DIRECTORY: Final = Path("/dev/shm")
PID_NODE: Final = "kthread-pid"
KIND: Final = "vbd3"
UPDATE_S: Final = 1.0
"""How old figures may be; xentop's own interval is three seconds."""

PAGE: Final = struct.Struct("<II11Q")
"""version (1), padding; requests outstanding; reads submitted, completed, sectors, ticks; the same
of writes; I/O errors; flags. Ticks are not shown by xentop, and stay 0."""


class XentopPage:
    """The page of one disk, there from construction to `close`.

    Raises OSError or `ConfigError`. Anybody may write in /dev/shm, and the name can be guessed: a
    page is only ever made in a directory that is ours, and never through a link.
    """

    def __init__(self, domid: int, vdev: int, *, directory: Path = DIRECTORY) -> None:
        self.path = page_path(directory, os.getpid(), domid, vdev)
        where = own_directory(self.path.parent, mode=0o755)
        try:
            remove(where, self.path.name)
            self._fd = create_own(where, self.path.name, mode=0o644)
        finally:
            os.close(where)
        self._last = b""
        self.update(BackCounters())

    def update(self, counters: BackCounters) -> None:
        """Show a disk's counters, by blkback's names."""
        page = PAGE.pack(
            1, 0, counters.in_flight,
            counters.rd_req, counters.rd_req, counters.rd_sect, 0,
            counters.wr_req, counters.wr_req, counters.wr_sect, 0,
            counters.storage_errors, 0,
        )  # fmt: skip
        if page != self._last:
            os.pwrite(self._fd, page, 0)
            self._last = page

    def close(self) -> None:
        """Take the page away. Idempotent."""
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        remove_page(self.path)


def page_path(directory: Path, pid: int, domid: int, vdev: int) -> Path:
    """Return the path where xentop reads the figures of a disk that process `pid` serves."""
    return directory / f"td3-{pid}" / f"vbd-{domid}-{vdev}"


def remove_page(path: Path) -> None:
    """Remove a page, ours or one that a killed predecessor left, and what held it if empty."""
    with contextlib.suppress(OSError, ConfigError):
        where = open_own_directory(path.parent)
        try:
            remove(where, path.name)
        finally:
            os.close(where)
        path.parent.rmdir()


class XentopPages:
    """The pages of all disks of a daemon; in the event loop's thread."""

    def __init__(self, store: XenstoreClient, directory: Path = DIRECTORY) -> None:
        self._store = store
        self._directory = directory
        self._pages: dict[str, tuple[XentopPage, Callable[[], BackCounters]]] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def add(self, path: str, counters: Callable[[], BackCounters]) -> None:
        """Show the disk at ``backend/vbd3/DOM/VDEV``; other kinds have no page.

        To be called before the disk is offered: libxenstat asks once. What cannot be shown is
        served all the same.
        """
        _, kind, domid, vdev = path.split("/")
        if kind != KIND or not (domid.isdigit() and vdev.isdigit()):
            return
        before = await self._store.try_read(f"{path}/{PID_NODE}") or ""
        if before.isdigit():  # a killed predecessor's
            remove_page(page_path(self._directory, int(before), int(domid), int(vdev)))
        try:
            page = XentopPage(int(domid), int(vdev), directory=self._directory)
        except (OSError, ConfigError) as error:
            logger.warning("%s: xentop cannot show it: %s", path, describe(error))
            return
        self._pages[path] = page, counters
        await change_device(self._store, path, state=None, write={PID_NODE: str(os.getpid())})
        if self._timer is None:
            self._update()

    def remove(self, path: str) -> None:
        """Take a disk's page away, if it has one."""
        if path in self._pages:
            self._pages.pop(path)[0].close()

    def close(self) -> None:
        """Take all away."""
        for path in list(self._pages):
            self.remove(path)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _update(self) -> None:
        for page, counters in self._pages.values():
            page.update(counters())
        again = asyncio.get_running_loop().call_later
        self._timer = again(UPDATE_S, self._update) if self._pages else None
