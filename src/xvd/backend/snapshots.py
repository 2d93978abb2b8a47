# SPDX-License-Identifier: Apache-2.0
"""States of a disk that its storage keeps, where it can: made, listed and removed while its guest
uses the disk, and gone back to while the disk is paused."""

import re
from typing import Any, Final

from xvd.backend.disk import ServedDisk
from xvd.backend.life import StorageLife
from xvd.backend.tracking import Tracking
from xvd.engines.interface import SnapshotAction
from xvd.errors import ConfigError
from xvd.xenbus.log import DeviceLog
from xvd.xenbus.runner import Runtime

_NAME: Final = re.compile(r"(?!\d+$)[A-Za-z0-9_.][A-Za-z0-9_.-]{0,63}")
"""No number alone: qcow2 has numbers for its snapshots, beside their names."""


class Snapshots:
    """The snapshots of one disk. For the event loop's thread; one change at a time."""

    def __init__(
        self,
        life: StorageLife,
        disk: ServedDisk,
        tracking: Tracking,
        log: DeviceLog,
        runtime: Runtime,
    ) -> None:
        self._life = life
        self._disk = disk
        self._tracking = tracking
        self._log = log
        self._runtime = runtime

    async def list(self) -> list[dict[str, Any]]:
        """List what there is: names, and seconds since 1970. Raises `EngineError` where the storage
        keeps none."""
        engine = self._life.storage.engine
        return [one._asdict() for one in await self._runtime.call(engine.snapshots)]

    async def change(self, action: str, name: str, timeout_s: float) -> None:
        """Create, delete or go back to one; the guest sees a delay. Raises `ConfigError` and
        `EngineError`, and then nothing is changed."""
        what = SnapshotAction(action)
        async with self._life.turn:
            if self._life.held_by:
                raise ConfigError(f"{self._log.disk}: {self._life.held_by}")
            self._check_name(what, name, {one["name"] for one in await self.list()})
            if what is SnapshotAction.REVERT and not self._disk.paused:
                raise ConfigError(
                    f"{self._log.disk}: its guest knows nothing of what the disk would have then; "
                    "shut it down, or let it forget what it has read, and pause the disk: xvd pause"
                )
            engine = self._life.storage.engine
            async with self._life.at_rest(timeout_s):
                await self._runtime.call(engine.flush)
                await self._runtime.call(engine.snapshot, what, name)
                if what is SnapshotAction.REVERT:
                    self._tracking.forget()
        self._log.info("snapshot %s: %s", name, what, event="snapshot")
        await self._disk.follow_size()

    def _check_name(self, what: SnapshotAction, name: str, there: set[str]) -> None:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} is no name of a snapshot: letters, digits and -_., not only digits"
            )
        if what is SnapshotAction.CREATE and name in there:
            raise ConfigError(f"{self._log.disk}: there is a snapshot {name} already")
        if what is not SnapshotAction.CREATE and name not in there:
            known = ", ".join(sorted(there)) or "none"
            raise ConfigError(f"{self._log.disk}: there is no snapshot {name}; there are: {known}")
