# SPDX-License-Identifier: Apache-2.0
"""Virtual time: it moves when the scheduler says so, and jumps when everybody sleeps."""


class Clock:
    """Nanoseconds since the world began."""

    def __init__(self) -> None:
        self.now_ns = 0

    def advance(self, by_ns: int) -> None:
        """Let time pass."""
        self.now_ns += by_ns

    def jump(self, to_ns: int) -> None:
        """Skip to a deadline; never backwards."""
        self.now_ns = max(self.now_ns, to_ns)
