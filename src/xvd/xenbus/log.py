# SPDX-License-Identifier: Apache-2.0
"""What a disk says in the log, within its guest's limit.

A line has its disk and an event besides its text: the journal keeps them as fields
(service/journal.py), and the texts may change.
"""

import logging
from collections.abc import MutableMapping
from typing import Any, Final

from xvd.loglimit import LogLimit, fields

EVENTS: Final = {
    "connected": "both ends are connected",
    "connect-failed": "the frontend cannot be connected to",
    "journal-set-aside": "what a predecessor left does not fit the ring, and nothing is lost",
    "ring-broken": "the guest has broken the ring, and the disk is closed",
    "gone": "the disk is detached",
    "failed": "the disk is not served; its `error` node says why",
    "nodes-unreadable": "the disk's nodes in the store cannot be read",
    "storage-slow": "the storage is still being opened, and the disk is offered meanwhile",
    "storage-failed": "the storage cannot be opened",
    "storage-error": "the storage has answered requests with errors",
    "storage-in-trouble": "the storage works, and something is wrong with it",
    "storage-smaller": "the storage is smaller than the disk",
    "storage-hangs": "the storage does not answer, and is left alone",
    "storage-busy": "somebody else has the storage of a connected guest, which waits for it",
    "withdrawn": "the storage cannot flush or discard after all",
    "held": "the storage is away, and the disk waits for it",
    "back": "the storage is back",
    "paused": "the disk is paused",
    "resumed": "the disk goes on",
    "swapped": "the disk has other storage",
    "left-closed": "storage that was left while it hung is closed",
    "close-failed": "storage that the disk had cannot be closed",
    "copy-began": "a copy of the disk is being made",
    "copy-same": "a mirror is the same as the disk",
    "copy-done": "a backup is made",
    "copy-failed": "a copy has failed",
    "copy-given-up": "a copy was cancelled",
    "pivoted": "the disk has moved to its mirror",
    "snapshot": "a snapshot was made, deleted or gone back to",
    "changes-unknown": "an incremental backup has to be a whole one",
    "resized": "the disk has another size",
    "resize-failed": "the disk keeps its size",
    "no-room": "the host has not enough for all that the disk would take",
    "figures": "what was counted (the setting `log_stats`)",
}
"""What a line may be about, and what that means."""


class DeviceLog(logging.LoggerAdapter[logging.Logger]):
    """Begins each line with the disk's name, within its guest's limit.

    Each call takes an `event` of `EVENTS`; what is logged for a search of mistakes needs none.
    """

    def __init__(self, logger: logging.Logger, disk: str, limit: LogLimit) -> None:
        super().__init__(logger, {})
        self.disk = disk
        self._limit = limit

    def process(
        self, msg: object, kwargs: MutableMapping[str, Any]
    ) -> tuple[str, MutableMapping[str, Any]]:
        """Put the name first, and in fields."""
        domain, _, vdev = self.disk.partition("/")
        kwargs["extra"] = fields(domain, vdev, kwargs.pop("event", ""))
        return f"{self.disk}: {msg}", kwargs

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log it, if the guest has not caused too many such lines."""
        if self.isEnabledFor(level) and self._limit.admit(self.logger, level, str(msg)):
            super().log(level, msg, *args, **kwargs)
