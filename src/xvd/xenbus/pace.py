# SPDX-License-Identifier: Apache-2.0
"""How often nodes are read that a peer may change as often as it likes (XSA-349).

Each reading costs the store several requests, which others wait behind. A life cycle needs some
tens at once and few after that; whoever makes more necessary waits for them himself.
"""

import time
from collections.abc import Callable
from typing import Final

READS_FREE: Final = 64
READS_PER_SECOND: Final = 50.0


class Pace:
    """Lets so many readings go at once and so many more in each second. For one thread.

    clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left = float(READS_FREE)
        self._since = clock()

    def wait_s(self) -> float:
        """Take one reading's place; how long to wait before it, seconds, mostly 0.0."""
        now = self._clock()
        self._left = min(READS_FREE, self._left + (now - self._since) * READS_PER_SECOND) - 1
        self._since = now
        return max(0.0, -self._left / READS_PER_SECOND)
