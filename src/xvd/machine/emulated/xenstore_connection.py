# SPDX-License-Identifier: Apache-2.0
"""One client's connection to the store: what it may do, and what it has begun.

Whoever makes a connection hands in what answers its requests (xenstore_requests.py), which
is made of the calls below.
"""

from collections.abc import Callable
from dataclasses import replace

from xvd.errors import XenstoreError
from xvd.machine.emulated.xenstore_domains import Domain, rights
from xvd.machine.emulated.xenstore_state import StoreState
from xvd.machine.emulated.xenstore_tree import Node, Transaction
from xvd.machine.emulated.xenstore_watches import Watch
from xvd.machine.xs.messages import (
    ERROR_NAMES,
    PAYLOAD_MAX,
    Message,
    MessageType,
    domain_path,
    is_valid_path,
    parent_path,
)


class Connection:
    """One client's side of the store: its domain, watches and open transactions.

    `answer` gives the payload of the reply to a request, or raises `XenstoreError`.
    """

    def __init__(
        self,
        store: StoreState,
        domain: Domain,
        send: Callable[[Message], None],
        drop: Callable[[], None],
        answer: "Callable[[Connection, Message], bytes]",
    ) -> None:
        self.store = store
        self._answer = answer
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
            payload = self._answer(self, message)
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
