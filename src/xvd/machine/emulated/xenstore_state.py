# SPDX-License-Identifier: Apache-2.0
"""What the connections to a store share: its tree, domains, watches and quotas; and their ends.

A change of a node fires watches of whatever connection; a domain that is released takes its
connections and nodes along. What one connection asks for is in xenstore_connection.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Protocol

from xvd.errors import XenstoreError
from xvd.machine.emulated.xenstore_domains import (
    DOM0_ONLY,
    READ,
    Domain,
    DomainTable,
    Perms,
    Quotas,
    forget_domain,
    rights,
)
from xvd.machine.emulated.xenstore_tree import Transaction, Tree
from xvd.machine.emulated.xenstore_watches import WatchIndex
from xvd.machine.xs.messages import parent_path
from xvd.types import DOMID_FIRST_RESERVED, Domid

INTRODUCE_DOMAIN: Final = "@introduceDomain"
RELEASE_DOMAIN: Final = "@releaseDomain"


def _any_domain(domid: int) -> bool:
    return 0 <= domid < DOMID_FIRST_RESERVED


@dataclass(frozen=True, slots=True)
class Counts:
    """How much of everything the store holds; what a test compares after each step."""

    nodes: int
    watches: int
    transactions: int
    connections: int
    domains: int


class Client(Protocol):
    """A connection, as what is shared sees it."""

    domain: Domain
    transactions: dict[int, Transaction]
    drop: Callable[[], None]

    def reset(self) -> None:
        """End its watches and transactions."""

    def close(self) -> None:
        """End it."""


class StoreState:
    """What all connections to one store share. One thread at a time.

    `quotas` bind unprivileged domains (a copy is taken; CONTROL can change it). `domain_exists`
    is asked, as the hypervisor would be, whether a domid is that of a living domain; by default
    every domid is. Dom0 is always there, and its connections are the privileged ones.
    """

    def __init__(
        self,
        quotas: Quotas | None = None,
        domain_exists: Callable[[int], bool] = _any_domain,
    ) -> None:
        self.quotas = replace(quotas) if quotas is not None else Quotas()
        self.domains = DomainTable(domain_exists)
        self.tree = Tree(self.domains, self.quotas)
        self.watches = WatchIndex()
        self.special_perms: dict[str, Perms] = {
            INTRODUCE_DOMAIN: DOM0_ONLY,
            RELEASE_DOMAIN: DOM0_ONLY,
        }
        self.requests_handled = 0
        self._connections: dict[Client, None] = {}

    @property
    def counts(self) -> Counts:
        """How much the store holds now."""
        return Counts(
            nodes=len(self.tree.nodes),
            watches=len(self.watches),
            transactions=sum(len(connection.transactions) for connection in self._connections),
            connections=len(self._connections),
            domains=sum(domain.introduced for domain in self.domains),
        )

    def add(self, connection: Client) -> None:
        """Count a new connection among the store's."""
        self._connections[connection] = None

    def forget(self, connection: Client) -> None:
        """Forget a connection; its own `close` is the call to make."""
        self._connections.pop(connection, None)

    def introduce(self, domid: Domid) -> None:
        """Do an INTRODUCE: the domain takes part from now on.

        Doing it again resets what the domain's connections hold, as for a restarted guest. Raises
        `XenstoreError` EINVAL if there is no such domain.
        """
        domain = self.domains.find_or_add(domid, self.tree.generation)
        if domain is None:
            raise XenstoreError("EINVAL", f"there is no domain {domid} to introduce")
        if not domain.introduced:
            domain.introduced = True
            self._fire_special(INTRODUCE_DOMAIN, domid)
        elif domain.unprivileged:
            for connection in self._connections_of(domain):
                connection.reset()

    def release(self, domid: Domid) -> None:
        """Do a RELEASE: drop the domain's connections, remove the nodes that it owns.

        Raises `XenstoreError` EINVAL for dom0, ENOENT for a domain not introduced.
        """
        if domid == 0:
            raise XenstoreError("EINVAL", "dom0 cannot be released")
        self._destroy(self.domains.find_introduced(domid))

    def resume(self, domid: Domid) -> None:
        """Do a RESUME: a later shutdown of the domain is reported again."""
        if domid == 0:
            raise XenstoreError("EINVAL", "dom0 cannot be resumed")
        self.domains.find_introduced(domid).shutdown = False

    def shut_down(self, domid: Domid) -> None:
        """The domain shut down or crashed, and still exists: ``@releaseDomain``, once."""
        domain = self.domains.find_introduced(domid)
        if not domain.shutdown:
            domain.shutdown = True
            self._fire_special(RELEASE_DOMAIN, domid)

    def check_domains(self) -> None:
        """Release every domain that `domain_exists` now denies, as after a notice of death."""
        for domain in self.domains:
            if self.domains.is_gone(domain):
                self._destroy(domain)

    def _connections_of(self, domain: Domain) -> list[Client]:
        return [connection for connection in self._connections if connection.domain is domain]

    def _destroy(self, domain: Domain) -> None:
        for connection in self._connections_of(domain):
            connection.close()
            connection.drop()
        self._remove_orphans(domain)
        for name, perms in self.special_perms.items():
            self.special_perms[name] = forget_domain(perms, domain.domid)
        self.domains.remove(domain.domid)
        if domain.introduced:
            self._fire_special(RELEASE_DOMAIN, domain.domid)

    def _remove_orphans(self, domain: Domain) -> None:
        # Nodes would else become those of the next domain with this number. Whole subtrees go,
        # whoever owns what is below; the root, which nobody gives away, would go to dom0.
        roots: list[str] = []
        root = self.tree.nodes["/"]
        if root.perms[0].domid == domain.domid:
            perms = forget_domain(root.perms, domain.domid)
            self.tree.write("/", replace(root, perms=perms), None, limited=False)
            self.tree.count_node(domain.domid, -1, None)
            self.tree.count_node(0, 1, None)
        if domain.nodes > 0:
            for path, node, leaving in self.tree.walk("/", None):
                covered = roots and path.startswith(roots[-1] + "/")
                if not leaving and not covered and node.perms[0].domid == domain.domid:
                    roots.append(path)
        for path in roots:
            self.remove_subtree(path, None)

    def remove_subtree(self, path: str, tx: Transaction | None) -> None:
        """Remove a node and all below it, children first; its parent must have been read.

        Each fires the watches on its own path, the topmost also those above it.
        """
        for below, node, leaving in self.tree.walk(path, tx):
            if leaving:
                self.tree.delete(below, tx)
                self.fire(below, node.perms, tx, exact=below != path)
                self.tree.count_node(node.perms[0].domid, -1, tx)
                if below != path:
                    # The child's name leaves a parent that goes next: a change that nobody sees.
                    self.tree.bump()
        self.tree.remove_child(path, tx)

    def fire(
        self,
        path: str,
        perms: Perms | None,
        tx: Transaction | None,
        exact: bool = False,
        old_perms: Perms | None = None,
    ) -> None:
        """Tell the watchers that may know that `path` changed, or note it for the commit.

        `perms` are the node's now (None to look them up), `old_perms` those before, which entitle
        a watcher as well: one that loses a node hears that it did.
        """
        if tx is not None:
            tx.queue_event(path, exact)
            return
        watches = self.watches.matching(path, exact)
        if not watches:
            return
        if perms is None:
            node = self.tree.read(path, None)
            perms = None if node is None else node.perms
        entitling = [old_perms, perms]
        parent = self.tree.read(parent_path(path), None)
        if parent is not None and perms is not None:
            entitling.append(parent.perms)
        for watch in watches:
            if any(known and rights(watch.domain, known) & READ for known in entitling):
                watch.fire(path)

    def _fire_special(self, name: str, domid: int) -> None:
        perms = self.special_perms[name]
        for watch, path in self.watches.matching_special(name, domid):
            if rights(watch.domain, perms) & READ:
                watch.fire(path)
