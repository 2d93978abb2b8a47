# SPDX-License-Identifier: Apache-2.0
"""A guest that is destroyed, and built anew under the number that it had.

Its processes, memory, grants, ports and, mostly, its part of the store are gone at once, in the
middle of whatever the others do. Then the toolstack removes its disk, the backend gives everything
back, and only after that there is another guest.
"""

from enum import Enum, auto

from xvd.machine.emulated.host import Host
from xvd.sim.back_process import BackProcess
from xvd.sim.checkers import CheckFailed
from xvd.sim.tool_process import GUEST, ToolProcess


class GuestState(Enum):
    """What is left of it."""

    RUNNING = auto()
    DESTROYED = auto()
    """The domain is gone; the toolstack has yet to begin."""
    REMOVING = auto()
    """The toolstack removes what it wrote."""
    LEAVING = auto()
    """Only the backend may still have something of it."""
    BUILDING = auto()
    """The toolstack builds the next one."""


class Guest:
    """The guest's life. host: has its domain already."""

    def __init__(self, host: Host, tool: ToolProcess) -> None:
        self.state = GuestState.RUNNING
        self._host = host
        self._tool = tool

    @property
    def exists(self) -> bool:
        """Whether there is such a domain."""
        return self.state in (GuestState.RUNNING, GuestState.BUILDING)

    def destroy(self, *, nodes_too: bool) -> None:
        """Let the domain be gone; its process is dead. nodes_too: and so is its directory."""
        self.state = GuestState.DESTROYED
        self._host.destroy_domain(GUEST)
        if nodes_too:
            self._tool.lose_guest()

    def go_on(self, back: BackProcess | None) -> None:
        """Take the next step to another guest, if what it waits for has come."""
        if not self._tool.idle:
            return
        if self.state is GuestState.DESTROYED:
            self._tool.wish("destroy")
            self.state = GuestState.REMOVING
        elif self.state is GuestState.REMOVING:
            if left := self._tool.left():
                raise CheckFailed(f"of a destroyed guest's disk there is still {left}")
            self.state = GuestState.LEAVING
        elif self.state is GuestState.LEAVING and back is not None and back.idle:
            self._check_given_back()
            self._host.create_domain(GUEST)
            self._tool.wish("build")
            self.state = GuestState.BUILDING
        elif self.state is GuestState.BUILDING:
            self.state = GuestState.RUNNING

    def _check_given_back(self) -> None:
        """Check that nobody has anything of it; only the sessions of the others are there."""
        taken = {name: n for name, n in self._host.accounting().items() if n and name != "sessions"}
        if taken:
            raise CheckFailed(f"of a destroyed guest's disk there is not given back: {taken}")
