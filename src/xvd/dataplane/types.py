# SPDX-License-Identifier: Apache-2.0
"""What Python and the compiled modules say to each other, for both of them."""

from enum import IntFlag
from typing import Protocol


class StepFlag(IntFlag):
    """What a step says of itself (ports.pxd, `stepper_ports`)."""

    WORKED = 1
    """Something moved: step again before sleeping."""
    BROKEN = 2
    """The peer broke the ring: never step again."""
    DRAINED = 4
    """Asked to stop, and nothing is in flight any more."""
    EXCHANGED = 8
    """It has other storage now: attach that to the thread, and hear of that only."""
    LEFT = 16
    """It has left its ring: hear of no event any more, only of its storage."""


class Wish(IntFlag):
    """What a client waits for (ports.pxd, `client_ports`)."""

    READS = 1
    """Step me when my descriptor is readable."""
    WRITES = 2
    """When it is writable."""


class HasPorts(Protocol):
    """An object whose capsule (see ports.pxd) leads to a C function table."""

    @property
    def ports(self) -> object:
        """The capsule."""
