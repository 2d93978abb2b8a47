# SPDX-License-Identifier: Apache-2.0
"""What a disk says in the log, within its guest's limit."""

import logging
from collections.abc import MutableMapping
from typing import Any

from xvd.loglimit import LogLimit


class DeviceLog(logging.LoggerAdapter[logging.Logger]):
    """Begins each line with the disk's name, within its guest's limit."""

    def __init__(self, logger: logging.Logger, disk: str, limit: LogLimit) -> None:
        super().__init__(logger, {})
        self.disk = disk
        self._limit = limit

    def process(
        self, msg: object, kwargs: MutableMapping[str, Any]
    ) -> tuple[str, MutableMapping[str, Any]]:
        """Put the name first."""
        return f"{self.disk}: {msg}", kwargs

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log it, if the guest has not caused too many such lines."""
        if self.isEnabledFor(level) and self._limit.admit(self.logger, level, str(msg)):
            super().log(level, msg, *args, **kwargs)
