# SPDX-License-Identifier: Apache-2.0
"""How much of the log one guest may fill: it can be the cause of most lines, as often as it likes.

The limit is one for each guest and text, whatever number of disks or connections the guest has.
What is left out is counted, and the count is logged when the time has passed. Like errors and
types, this may be imported by all.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from xvd.types import Domid

BURST: Final = {logging.ERROR: 4, logging.WARNING: 4, logging.INFO: 64}
"""Lines of one text that a guest may cause at once, by level; DEBUG has no limit."""

PERIOD_S: Final = 10.0
"""After so long it may cause as many again."""


def fields(domain: str, vdev: str = "", event: str = "") -> dict[str, str]:
    """Return what a line is about, as `logging` takes it for ``extra``.

    The journal has these as fields (service/journal.py).
    """
    return {"xvd_domain": domain, "xvd_vdev": vdev, "xvd_event": event}


@dataclass(slots=True)
class _Text:
    since: float
    lines: int = 0
    left_out: int = 0


class LogLimit:
    """How many lines of each text one guest may cause. For the event loop's thread.

    domid: None for a disk whose guest is not known. clock: seconds that never go back.
    """

    def __init__(self, domid: Domid | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._guest = "a guest" if domid is None else f"domain {domid}"
        self._fields = fields("" if domid is None else str(domid), event="lines-left-out")
        self._clock = clock
        self._texts: dict[str, _Text] = {}

    def admit(self, logger: logging.Logger, level: int, text: str) -> bool:
        """Whether a line of this text may be logged now; one that may not is counted.

        text: what is the same in all lines of its kind, as a format string is.
        """
        burst = BURST.get(level)
        if burst is None:
            return True
        now = self._clock()
        found = self._texts.setdefault(text, _Text(now))
        if now - found.since >= PERIOD_S:
            self.tell(logger, level, text)
            found.since, found.lines = now, 0
        if found.lines < burst:
            found.lines += 1
            return True
        if found.left_out == 0:
            self._tell_later(logger, level, text)
        found.left_out += 1
        return False

    def log(self, logger: logging.Logger, level: int, text: str, *arguments: object) -> None:
        """Log a line of this text, as `Logger.log` does, if it may be."""
        if self.admit(logger, level, text):
            logger.log(level, text, *arguments)

    def _tell_later(self, logger: logging.Logger, level: int, text: str) -> None:
        try:
            events = asyncio.get_running_loop()
        except RuntimeError:
            return  # no loop: told before the next line
        events.call_later(PERIOD_S, self.tell, logger, level, text)

    def tell(self, logger: logging.Logger, level: int, text: str) -> None:
        """Log how many lines of this text were left out, if any were."""
        found = self._texts[text]
        if found.left_out:
            count, found.left_out = found.left_out, 0
            told = "%s: %d more lines left out, as %r"
            logger.log(level, told, self._guest, count, text, extra=self._fields)
