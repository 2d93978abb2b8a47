# SPDX-License-Identifier: Apache-2.0
"""What one process of a domain can do, whatever machine it runs on.

This is the contract between the control plane and a machine. The data plane does not see it: it
gets the C tables of dataplane/ports.pxd, which hang off these objects as capsules (`ports`). One
contract suite (tests/contract) runs over every machine.

Everything here is called from the control plane's one thread unless said otherwise. Closing is
idempotent; closing a Machine closes what was made through it, and what the peer still holds is
given back as soon as the peer unmaps it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from xvd.types import Domid, Gref, Port

if TYPE_CHECKING:
    from xvd.machine.xs.client import XenstoreClient


class SharedPages(Protocol):
    """Pages of this domain's own memory, page i granted to one peer as ``grefs[i]``.

    The pages are zero when handed out, so that nothing of a former use can leak (XSA-403).
    """

    @property
    def count(self) -> int:
        """Number of pages."""

    @property
    def grefs(self) -> Sequence[Gref]:
        """One reference for each page."""

    @property
    def stride(self) -> int:
        """Bytes from one page to the next: 4096, or the kernel's pages where those are larger."""

    @property
    def view(self) -> memoryview:
        """The first page to the last as writable bytes; page i begins at ``i * stride``."""

    @property
    def ports(self) -> object:
        """Capsule ``xvd.granter_ports``."""

    def grant(self, page: int, *, readonly: bool = False) -> None:
        """Let the peer map the page. All pages are granted read-write at first."""

    def revoke(self, page: int) -> bool:
        """Take the grant back; False while the peer has it mapped, and then nothing changed."""

    def close(self) -> None:
        """Revoke everything and free the pages; those still mapped are freed when they are not."""


class Mapping(Protocol):
    """Pages of another domain, mapped into this process in one piece of address space."""

    @property
    def address(self) -> int:
        """Virtual address of the first page; valid until closed."""

    @property
    def stride(self) -> int:
        """Bytes from one page to the next, as of `SharedPages`."""

    @property
    def view(self) -> memoryview:
        """The first page to the last as bytes; read-only if mapped so. Not to be used once closed.

        What lies between two pages that are `stride` apart is not to be touched.
        """

    def close(self) -> None:
        """Unmap."""


class ForeignGrants(Protocol):
    """The grants that one peer has made to this domain."""

    @property
    def ports(self) -> object:
        """Capsule ``xvd.grant_ports``."""

    def map(self, grefs: Sequence[Gref], *, writable: bool = True) -> Mapping:
        """Map the references in their order, `Mapping.stride` bytes apart.

        All or nothing: raises `GrantError` with the status of the first that failed.
        """

    def read(self, gref: Gref, offset: int, size: int) -> bytes:
        """Copy bytes out of a granted page; raises `GrantError`."""

    def write(self, gref: Gref, offset: int, data: bytes) -> None:
        """Copy bytes into a granted page; raises `GrantError`."""

    def close(self) -> None:
        """Release the peer's table; every mapping made through it must be closed already."""


class GrantTable(Protocol):
    """Granting and mapping."""

    def share(self, peer: Domid, count: int) -> SharedPages:
        """Take `count` fresh pages of our memory and grant them to `peer`.

        Raises `GrantError` when memory or references run out; then nothing was taken.
        """

    def foreign(self, peer: Domid) -> ForeignGrants:
        """Access to what `peer` grants us; raises `GrantError` if there is no such domain."""


class EventChannel(Protocol):
    """Our end of an event channel."""

    @property
    def port(self) -> Port:
        """The number of our end."""

    @property
    def ports(self) -> object:
        """Capsule ``xvd.event_ports``."""

    def fileno(self) -> int:
        """A descriptor that is readable while an event is pending."""

    def notify(self) -> None:
        """Send an event; nothing happens if nobody is bound. Any thread."""

    def consume(self) -> bool:
        """Acknowledge: True if an event was pending. Events collapse into one. Any thread."""

    def close(self) -> None:
        """Unbind; the peer's end goes back to unbound, reserved for the same domain."""


class EventChannels(Protocol):
    """Making ends of event channels."""

    def alloc_unbound(self, peer: Domid) -> EventChannel:
        """A new end to which only `peer` may bind; raises `EventChannelError` at the limit."""

    def bind_interdomain(self, peer: Domid, port: Port) -> EventChannel:
        """Bind to the peer's unbound end; our end has one event pending from the start.

        Raises `EventChannelError` (EINVAL) if there is no such end or it is not meant for us.
        """


class Claim(Protocol):
    """A disk that this process is the frontend of; it ends with the process at the latest."""

    def close(self) -> None:
        """Let another frontend have it. Idempotent."""


class Machine(Protocol):
    """One process's connection to one domain."""

    @property
    def domid(self) -> Domid:
        """The domain this process runs in."""

    @property
    def grants(self) -> GrantTable:
        """Granting and mapping."""

    @property
    def event_channels(self) -> EventChannels:
        """Event channels."""

    def claim(self, vdev: int) -> Claim:
        """Become the only frontend of a disk of this domain.

        Raises `DiskInUse` if there is one already, in this process or another.
        """

    async def xenstore(self) -> "XenstoreClient":
        """A new connection to the store under this domain's identity."""

    def close(self) -> None:
        """Give everything back."""
