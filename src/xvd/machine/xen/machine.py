# SPDX-License-Identifier: Apache-2.0
"""`Machine` on real Xen: this process's connection to the domain it runs in."""

import weakref
from collections.abc import Awaitable, Callable
from typing import Protocol

from xvd.errors import ConfigError, XenstoreError
from xvd.machine.xen import xenstore
from xvd.machine.xen.claim import XenClaim
from xvd.machine.xen.evtchn import XenEventChannel
from xvd.machine.xen.gntalloc import XenSharedPages
from xvd.machine.xen.gntdev import XenForeignGrants
from xvd.machine.xs.client import XenstoreClient
from xvd.types import Domid, Port


class _Closable(Protocol):
    def close(self) -> None: ...


class XenMachine:
    """`machine.interface.Machine` on the devices of a Linux domain; `here` makes it.

    connect: opens a connection to the store.

    Each thing made through it has an open device of its own, so the kernel gives back whatever a
    process that dies held.
    """

    def __init__(
        self,
        domid: Domid,
        connect: Callable[[], Awaitable[XenstoreClient]] = xenstore.connect,
    ) -> None:
        self.domid = domid
        self._connect = connect
        self._made: weakref.WeakSet[_Closable] = weakref.WeakSet()
        self.grants = XenGrantTable(self._made)
        self.event_channels = XenEventChannels(self._made)

    @classmethod
    async def here(cls) -> "XenMachine":
        """The domain that this process runs in, by its own ``domid`` node.

        Raises `PeerClosed` without a xenstore, `ConfigError` where the toolstack wrote no node.
        """
        async with await xenstore.connect() as store:
            try:
                return cls(Domid(int(await store.read("domid"))))
            except (XenstoreError, ValueError) as error:
                raise ConfigError(
                    f"xenstore does not say which domain this is (node domid: {error}); in dom0 "
                    "xen-init-dom0 writes it"
                ) from None

    def claim(self, vdev: int) -> XenClaim:
        """Become the only frontend of a disk of this domain; `DiskInUse`."""
        claim = XenClaim(vdev)
        self._made.add(claim)
        return claim

    async def xenstore(self) -> XenstoreClient:
        """A new connection to the store under this domain's identity."""
        return await self._connect()

    def close(self) -> None:
        """Give everything back; a mapping that somebody still holds goes when it is closed."""
        for thing in list(self._made):
            thing.close()


class XenGrantTable:
    """`machine.interface.GrantTable`."""

    def __init__(self, made: "weakref.WeakSet[_Closable]") -> None:
        self._made = made

    def share(self, peer: Domid, count: int) -> XenSharedPages:
        """Take fresh pages and grant them to `peer`."""
        pages = XenSharedPages(peer, count)
        self._made.add(pages)
        return pages

    def foreign(self, peer: Domid) -> XenForeignGrants:
        """Access to what `peer` grants us."""
        grants = XenForeignGrants(peer)
        self._made.add(grants)
        return grants


class XenEventChannels:
    """`machine.interface.EventChannels`."""

    def __init__(self, made: "weakref.WeakSet[_Closable]") -> None:
        self._made = made

    def alloc_unbound(self, peer: Domid) -> XenEventChannel:
        """A new end to which only `peer` may bind."""
        return self._keep(XenEventChannel.alloc_unbound(peer))

    def bind_interdomain(self, peer: Domid, port: Port) -> XenEventChannel:
        """Bind to the peer's unbound end."""
        return self._keep(XenEventChannel.bind_interdomain(peer, port))

    def _keep(self, end: XenEventChannel) -> XenEventChannel:
        self._made.add(end)
        return end
