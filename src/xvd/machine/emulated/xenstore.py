# SPDX-License-Identifier: Apache-2.0
"""A xenstore without I/O: connections put messages in, replies and watch events come out.

The idea to read it by: `Connection.handle` answers one request at once and completely, sending the
events that it causes, to whomever, in the same call and in the order in which C xenstored 4.17
would; nothing here waits, keeps time or knows a socket. Paths and tokens are str with one character
per byte (latin-1), values are bytes. The semantics are those of xenstore.txt and, where that is
silent, of C xenstored 4.17, which the tests run beside it. What is beyond it: a watch's depth.
What is missing: its limits on memory, rate and outstanding requests, which need a clock or a queue.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from xvd.errors import XenstoreError
from xvd.machine.emulated import xenstore_requests as requests
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
from xvd.machine.emulated.xenstore_tree import Node, Transaction, Tree
from xvd.machine.emulated.xenstore_watches import Watch, WatchIndex
from xvd.machine.xs.messages import (
    ERROR_NAMES,
    PAYLOAD_MAX,
    Message,
    MessageType,
    domain_path,
    is_valid_path,
    parent_path,
)
from xvd.types import Domid

INTRODUCE_DOMAIN: Final = "@introduceDomain"
RELEASE_DOMAIN: Final = "@releaseDomain"
DOMID_FIRST_RESERVED: Final = 0x7FF0


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


class XenstoreStore:
    """The store that all domains of one machine share. One thread at a time.

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
        self._connections: dict[Connection, None] = {}

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

    def connect(
        self, domid: Domid, send: Callable[[Message], None], drop: Callable[[], None]
    ) -> "Connection":
        """A new connection of a domain, which need not be introduced yet.

        `send` is called with each reply and event, `drop` if the domain is released: both at once,
        from within whatever call causes it, and they must not call back into the store. Raises
        `XenstoreError` ENOENT if there is no such domain.
        """
        domain = self.domains.find_or_add(domid, self.tree.generation)
        if domain is None:
            raise XenstoreError("ENOENT", f"there is no domain {domid}")
        connection = Connection(self, domain, send, drop)
        self._connections[connection] = None
        return connection

    def forget(self, connection: "Connection") -> None:
        """A connection's last act; `Connection.close` is the call to make."""
        self._connections.pop(connection, None)

    def introduce(self, domid: Domid) -> None:
        """What INTRODUCE does: the domain takes part from now on.

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
        """What RELEASE does: drop the domain's connections, remove the nodes that it owns.

        Raises `XenstoreError` EINVAL for dom0, ENOENT for a domain not introduced.
        """
        if domid == 0:
            raise XenstoreError("EINVAL", "dom0 cannot be released")
        self._destroy(self.domains.find_introduced(domid))

    def resume(self, domid: Domid) -> None:
        """What RESUME does: a later shutdown of the domain is reported again."""
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

    def _connections_of(self, domain: Domain) -> list["Connection"]:
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


class Connection:
    """One client's side of the store: its domain, watches and open transactions."""

    def __init__(
        self,
        store: XenstoreStore,
        domain: Domain,
        send: Callable[[Message], None],
        drop: Callable[[], None],
    ) -> None:
        self.store = store
        self.domain = domain
        self.drop = drop
        self.transactions: dict[int, Transaction] = {}
        self.watches: dict[tuple[str, str], Watch] = {}
        self._send = send
        self.after_reply: Callable[[], None] | None = None
        """What the request in hand still has to do once its reply is sent."""
        self._last_tx_id = 0
        self._events_of_request = 0
        self._events: set[bytes] = set()

    @property
    def limited(self) -> bool:
        """Whether quotas and permissions bind it."""
        return self.domain.unprivileged

    def handle(self, message: Message) -> None:
        """Answer one request: exactly one reply, with the events that it causes around it."""
        self.store.requests_handled += 1
        try:
            payload = requests.answer(self, message)
            if len(payload) > PAYLOAD_MAX:
                raise XenstoreError("E2BIG", f"the answer has {len(payload)} bytes")
            answered = message.type
        except XenstoreError as error:
            answered = MessageType.ERROR
            payload = (error.code if error.code in ERROR_NAMES else "EINVAL").encode() + b"\0"
        self._send(Message(answered, message.req_id, message.tx_id, payload))
        if self.after_reply is not None:
            after_reply, self.after_reply = self.after_reply, None
            after_reply()

    def close(self) -> None:
        """The client went: its watches and transactions end."""
        self.reset()
        self.store.forget(self)

    def reset(self) -> None:
        """End all watches and transactions (RESET_WATCHES)."""
        for watch in list(self.watches.values()):
            self.remove_watch(watch)
        self.domain.transactions -= len(self.transactions)
        self.transactions.clear()

    def canonical(self, path: str) -> str:
        """The path from the root: one that starts with neither / nor @ is the caller's own."""
        return path if path[:1] in ("/", "@") else f"{domain_path(self.domain.domid)}/{path}"

    def get_node(self, path: str, needed: int, tx: Transaction | None) -> Node:
        """The node at an absolute path, if the caller has every right in `needed`.

        Raises `XenstoreError` EINVAL for a path that no node can have, ENOENT or EACCES. A caller
        without any of these rights on the nearest existing ancestor is told EACCES even of a node
        that does not exist.
        """
        if not is_valid_path(path, self.store.quotas.path_max):
            raise XenstoreError("EINVAL", f"{path!r} is no path of a node")
        node = self.store.tree.read(path, tx)
        if node is not None and rights(self.domain, node.perms) & needed == needed:
            return node
        ancestor = None
        above = path
        while ancestor is None:
            above = parent_path(above)
            ancestor = self.store.tree.read(above, tx)
        if node is None and rights(self.domain, ancestor.perms) & needed:
            raise XenstoreError("ENOENT", path)
        raise XenstoreError("EACCES", path)

    def create_node(self, path: str, value: bytes, tx: Transaction | None) -> Node:
        """Make a node that does not exist, and the missing ones above it.

        They inherit the nearest ancestor's list; an unprivileged creator becomes the owner.
        Raises `XenstoreError` ENOSPC over a quota, with nothing left behind.
        """
        tree = self.store.tree
        missing = [path]
        above = parent_path(path)
        while (parent := tree.read(above, tx)) is None:
            missing.append(above)
            above = parent_path(above)
        perms = parent.perms
        if self.limited:
            perms = (replace(perms[0], domid=self.domain.domid), *perms[1:])
        if tx is not None:
            tx.created = True
        made: list[str] = []
        try:
            child: tuple[str, ...] = ()
            for below in missing:
                self._create_one(below, Node(value, perms, child), tx, made)
                child, value = (below[below.rindex("/") + 1 :],), b""
            tree.write(above, replace(parent, children=parent.children + child), tx, self.limited)
        except XenstoreError:
            for below in made:
                tree.discard(below, tx)
                tree.count_node(perms[0].domid, -1, tx)
            if tx is not None and made:
                tx.failed = True
            raise
        node = tree.read(path, tx)
        assert node is not None
        return node

    def _create_one(self, path: str, node: Node, tx: Transaction | None, made: list[str]) -> None:
        tree = self.store.tree
        if self.limited and self.domain.nodes >= self.store.quotas.nodes:
            raise XenstoreError("ENOSPC", f"a domain may own {self.store.quotas.nodes} nodes")
        tree.write(path, node, tx, self.limited)
        if not tree.count_node(node.perms[0].domid, 1, tx):
            tree.discard(path, tx)
            raise XenstoreError("ENOMEM", f"the owner of {path} is gone")
        made.append(path)

    def start_transaction(self) -> Transaction:
        """Open a transaction; raises `XenstoreError` ENOSPC over the quota."""
        if self.limited and self.domain.transactions > self.store.quotas.transactions:
            raise XenstoreError("ENOSPC", "too many open transactions")
        while True:
            self._last_tx_id = (self._last_tx_id + 1) & 0xFFFFFFFF
            if self._last_tx_id and self._last_tx_id not in self.transactions:
                break
        self.store.tree.bump()
        nodes_max = self.store.quotas.transaction_nodes if self.limited else None
        tx = self.transactions[self._last_tx_id] = Transaction(self._last_tx_id, nodes_max)
        self.domain.transactions += 1
        return tx

    def end_transaction(self, tx: Transaction, commit: bool) -> None:
        """Close a transaction, for good whatever comes of it.

        Raises `XenstoreError` EAGAIN on a conflict, ENOSPC over the quota, ENOMEM if it failed.
        """
        del self.transactions[tx.tx_id]
        self.domain.transactions -= 1
        if not commit:
            return
        if tx.failed:
            raise XenstoreError("ENOMEM", "an earlier request of this transaction failed")
        self.store.tree.check_counts(tx, tx.created and self.limited)
        for change in self.store.tree.commit(tx):
            self.store.fire(change.path, None, None, change.exact, change.old_perms)

    def add_watch(self, path: str, token: str, depth: int | None) -> None:
        """Set a watch, whose first event follows the reply at once.

        Raises `XenstoreError` EINVAL for a path that cannot be watched, EEXIST, E2BIG (quota).
        """
        full = self.canonical(path)
        special = full.startswith("@")
        if len(full) > 2048 if special else not is_valid_path(full, self.store.quotas.path_max):
            raise XenstoreError("EINVAL", f"{path!r} cannot be watched")
        if (full, token) in self.watches:
            raise XenstoreError("EEXIST", f"{path!r} is watched with this token already")
        if self.limited and self.domain.watches > self.store.quotas.watches:
            raise XenstoreError("E2BIG", "too many watches")
        prefix_size = len(full) - len(path)
        watch = Watch(
            self.store.watches.next_serial(),
            self.domain,
            full,
            token,
            prefix_size,
            depth,
            self._send_event,
        )
        self.watches[full, token] = watch
        self.store.watches.add(watch)
        self.domain.watches += 1
        self.after_reply = lambda: watch.fire(full)

    def remove_watch(self, watch: Watch) -> None:
        """End one of this connection's watches."""
        del self.watches[watch.path, watch.token]
        self.store.watches.remove(watch)
        self.domain.watches -= 1

    def _send_event(self, path: str, token: str) -> None:
        payload = f"{path}\0{token}\0".encode("latin-1")
        if self._events_of_request != self.store.requests_handled:
            self._events_of_request = self.store.requests_handled
            self._events.clear()
        # As C xenstored: an event is not sent if it does not fit a message, nor twice for one
        # request (two watches may share a token), unless it is a special one.
        if len(payload) > PAYLOAD_MAX or payload in self._events:
            return
        if not path.startswith("@"):
            self._events.add(payload)
        self._send(Message(MessageType.WATCH_EVENT, 0, 0, payload))
