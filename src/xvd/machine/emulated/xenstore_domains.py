# SPDX-License-Identifier: Apache-2.0
"""Who may do what in the store, and how much of it: domains, quotas and permission entries.

The idea to read it by: a permission names a domid, domids are reused, so an entry counts only for
a domain that is older than the node's last write. Every `Domain` remembers the store's generation
when it appeared, and an entry found to be for a younger or a missing domain is marked `ignored`
and stays so. This is how C xenstored 4.17 keeps a new domain out of its predecessor's nodes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from xvd.errors import XenstoreError
from xvd.machine.xs.messages import Access, Permission, parse_permission

READ: Final = 1
WRITE: Final = 2
OWNER: Final = 4
EVERYTHING: Final = READ | WRITE | OWNER


@dataclass(slots=True)
class Quotas:
    """What one unprivileged domain may use; the defaults are those of C xenstored 4.17.

    Dom0 is bound by `path_max` only. `watches` and `transactions` let one more through than they
    say, as C xenstored does.
    """

    nodes: int = 1000
    """Nodes that the domain owns."""
    watches: int = 128
    transactions: int = 10
    """Transactions that are open at once."""
    node_size: int = 2048
    """Bytes of one node: 24, 8 per permission, the value, and each child's name with its NUL."""
    permissions: int = 5
    """Entries in a list that the domain sets."""
    transaction_nodes: int = 1024
    """Nodes that one transaction reads or changes."""
    path_max: int = 2048
    """Bytes of a path after ``/local/domain/<domid>/``, or of the whole path elsewhere."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A permission in a node; `ignored` once its domain was seen to be gone or too young."""

    access: Access
    domid: int
    ignored: bool = False

    def __str__(self) -> str:
        return str(Permission(self.access, self.domid))


Perms = tuple[Entry, ...]

DOM0_ONLY: Final[Perms] = (Entry(Access.NONE, 0),)


@dataclass(slots=True)
class Domain:
    """What the store knows of one domain, introduced or only mentioned in a permission."""

    domid: int
    generation: int
    introduced: bool = False
    shutdown: bool = False
    target: int | None = None
    """The domain whose rights this one has too: its device model's guest (SET_TARGET)."""
    nodes: int = 0
    watches: int = 0
    transactions: int = 0

    @property
    def unprivileged(self) -> bool:
        """Whether quotas and permissions bind it: every domain but dom0."""
        return self.domid != 0


class DomainTable:
    """Every domain that the store has heard of; `exists` is what the hypervisor would say."""

    def __init__(self, exists: Callable[[int], bool]) -> None:
        self._exists = exists
        self._domains: dict[int, Domain] = {0: Domain(0, 0, introduced=True)}

    def __iter__(self) -> Iterator[Domain]:
        return iter(list(self._domains.values()))

    def find(self, domid: int) -> Domain | None:
        """The domain, if the store has heard of it."""
        return self._domains.get(domid)

    def find_introduced(self, domid: int) -> Domain:
        """The domain, if it was introduced; raises `XenstoreError` ENOENT otherwise."""
        domain = self._domains.get(domid)
        if domain is None or not domain.introduced:
            raise XenstoreError("ENOENT", f"domain {domid} has not been introduced")
        return domain

    def find_or_add(self, domid: int, generation: int) -> Domain | None:
        """The domain, heard of now if it exists; None if there is no such domain at all."""
        domain = self._domains.get(domid)
        if domain is None and self._exists(domid):
            domain = self._domains[domid] = Domain(domid, generation)
        return domain

    def remove(self, domid: int) -> None:
        """Forget a domain: from now on every entry for it is ignored."""
        del self._domains[domid]

    def is_gone(self, domain: Domain) -> bool:
        """Whether the hypervisor no longer has it."""
        return domain.domid != 0 and not self._exists(domain.domid)

    def parse_perms(self, texts: list[str], generation: int) -> Perms:
        """The list of a SET_PERMS; entries for domains that do not exist are kept but ignored.

        Raises `XenstoreError` EINVAL for a malformed entry, ENOENT if the owner does not exist.
        """
        entries = []
        for permission in [parse_permission(text) for text in texts]:
            known = self.find_or_add(permission.domid, generation) is not None
            entries.append(Entry(permission.access, permission.domid, ignored=not known))
        if entries[0].ignored:
            raise XenstoreError("ENOENT", f"the owner {entries[0]} does not exist")
        return tuple(entries)

    def without_strangers(self, perms: Perms, generation: int) -> Perms:
        """Mark the entries of a list that are for domains younger than `generation`."""
        if len(perms) == 1 or all(
            entry.ignored or self._older(entry.domid, generation) for entry in perms[1:]
        ):
            return perms
        return perms[:1] + tuple(
            entry
            if entry.ignored or self._older(entry.domid, generation)
            else replace(entry, ignored=True)
            for entry in perms[1:]
        )

    def _older(self, domid: int, generation: int) -> bool:
        domain = self._domains.get(domid)
        return domain is not None and domain.generation <= generation


def rights(caller: Domain, perms: Perms) -> int:
    """READ, WRITE and OWNER bits that `caller` has by a node's list."""
    if not caller.unprivileged or perms[0].domid in (caller.domid, caller.target):
        return EVERYTHING
    for entry in perms[1:]:
        if not entry.ignored and entry.domid in (caller.domid, caller.target):
            return int(entry.access)
    return int(perms[0].access)


def forget_domain(perms: Perms, domid: int) -> Perms:
    """The list of a special watch after a domain went: dom0 owns it if that domain did."""
    owner = replace(perms[0], domid=0) if perms[0].domid == domid else perms[0]
    return (owner, *(entry for entry in perms[1:] if entry.domid != domid))
