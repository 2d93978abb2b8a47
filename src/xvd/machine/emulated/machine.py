# SPDX-License-Identifier: Apache-2.0
"""`Machine` on the emulated host: one process's view, over a session here or across a socket."""

import mmap
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from xvd.machine.emulated.evtchn import EmulatedEventChannel
from xvd.machine.emulated.grants import EmulatedForeignGrants, EmulatedSharedPages
from xvd.machine.emulated.host import Session
from xvd.machine.emulated.link import LinkClient
from xvd.machine.emulated.shared import DomainState
from xvd.types import PAGE_SIZE, Domid, Gref, Port

if TYPE_CHECKING:
    from xvd.machine.xs.client import XenstoreClient


Calls = Session | LinkClient
"""The host's slow path, in this process or over a socket.

The descriptors that a call returns are the caller's, who closes them.
"""


class EmulatedClaim:
    """`machine.interface.Claim`: the host forgets it with the session."""

    def __init__(self, calls: Calls, vdev: int) -> None:
        self._calls = calls
        self._vdev = vdev
        self._held = True
        calls.claim(vdev)

    def close(self) -> None:
        """Let another frontend have the disk."""
        if self._held:
            self._held = False
            self._calls.disclaim(self._vdev)


class EmulatedMachine:
    """One process's connection to one domain: `machine.interface.Machine`.

    `connect` opens a xenstore connection under the domain's identity. `page_size` is that of the
    domain's kernel, at least this one's: each page that is shared or mapped then takes a whole one
    of those, as Linux's devices have it on ARM64 with pages of 16 or 64 KiB.
    """

    def __init__(
        self,
        calls: Calls,
        connect: Callable[[], Awaitable["XenstoreClient"]],
        page_size: int = mmap.PAGESIZE,
    ) -> None:
        self.page_size = page_size
        self._calls = calls
        self._connect = connect
        self._states: dict[Domid, DomainState] = {}
        self.domid = calls.domid
        self.grants = EmulatedGrantTable(self)
        self.event_channels = EmulatedEventChannels(self)

    @property
    def calls(self) -> Calls:
        """The host's slow path."""
        return self._calls

    def state(self, domid: Domid) -> DomainState:
        """A domain's shared state; raises `GrantError` if there is no such domain.

        Ours is mapped once. A peer's is asked for each time: another domain may have its number.
        """
        if domid in self._states:
            return self._states[domid]
        memory_fd, heap_fd, limits = self._calls.state(domid)
        try:
            state = DomainState(domid, memory_fd, heap_fd, limits)
        finally:
            os.close(memory_fd)
            os.close(heap_fd)
        if domid == self.domid:
            self._states[domid] = state
        return state

    def claim(self, vdev: int) -> EmulatedClaim:
        """Become the only frontend of a disk of this domain; `DiskInUse`."""
        return EmulatedClaim(self._calls, vdev)

    async def xenstore(self) -> "XenstoreClient":
        """A new connection to the store under this domain's identity."""
        return await self._connect()

    def close(self) -> None:
        """Give everything back."""
        self._calls.close()
        self._states.clear()


class EmulatedGrantTable:
    """`machine.interface.GrantTable`."""

    def __init__(self, machine: EmulatedMachine) -> None:
        self._machine = machine

    def share(self, peer: Domid, count: int) -> EmulatedSharedPages:
        """Take fresh pages and grant them to `peer`."""
        calls, stride = self._machine.calls, self._machine.page_size
        each = stride // PAGE_SIZE
        # What lies between the pages keeps its references, which are granted to nobody.
        frame, grefs = calls.share(peer, count * each)

        def release(frame: int, _count: int, _grefs: Sequence[Gref]) -> None:
            calls.unshare(frame)

        own = self._machine.state(self._machine.domid)
        return EmulatedSharedPages(own, peer, frame, grefs[::each], release, stride)

    def foreign(self, peer: Domid) -> EmulatedForeignGrants:
        """Access to what `peer` grants us."""
        own = self._machine.state(self._machine.domid)
        machine = self._machine
        return EmulatedForeignGrants(
            own, machine.state(peer), machine.calls.number, machine.page_size
        )


class EmulatedEventChannels:
    """`machine.interface.EventChannels`."""

    def __init__(self, machine: EmulatedMachine) -> None:
        self._machine = machine

    def alloc_unbound(self, peer: Domid) -> EmulatedEventChannel:
        """A new end to which only `peer` may bind."""
        return self._end(peer, *self._machine.calls.alloc_unbound(peer))

    def bind_interdomain(self, peer: Domid, port: Port) -> EmulatedEventChannel:
        """Bind to the peer's unbound end."""
        return self._end(peer, *self._machine.calls.bind_interdomain(peer, port))

    def _end(self, peer: Domid, port: Port, fd: int, peer_fd: int) -> EmulatedEventChannel:
        own = self._machine.state(self._machine.domid)
        release = self._machine.calls.unbind
        try:
            return EmulatedEventChannel(own, self._machine.state(peer), port, fd, peer_fd, release)
        finally:
            os.close(fd)
            os.close(peer_fd)
