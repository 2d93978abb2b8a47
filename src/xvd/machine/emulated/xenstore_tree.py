# SPDX-License-Identifier: Apache-2.0
"""The store's nodes, and transactions over them.

The idea to read it by: nodes are immutable and stand in one flat dict by path, and each carries the
generation (a counter of every change anywhere) of its last write. A transaction is an overlay:
whatever path it touches, even one that does not exist, is noted with the generation it had, and a
commit succeeds only if none of these paths has changed since. So a conflict is a conflict on a
node that was read, parents that were asked for permission among them, never on the whole tree.
That is C xenstored's rule (xenstored_transaction.c), and clients see its effects, so it is ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from xvd.errors import XenstoreError
from xvd.machine.emulated.xenstore_domains import (
    DOM0_ONLY,
    DomainTable,
    Perms,
    Quotas,
)
from xvd.machine.xs.messages import child_path, parent_path

_NODE_HEADER_SIZE: Final = 24
_ENTRY_SIZE: Final = 8


@dataclass(frozen=True, slots=True)
class Node:
    """One node: its value, its permission list, its children's names in order of creation."""

    value: bytes
    perms: Perms
    children: tuple[str, ...] = ()
    generation: int = 0

    @property
    def size(self) -> int:
        """Bytes that count against the node-size quota: C xenstored's record of the node."""
        names = sum(map(len, self.children)) + len(self.children)
        return _NODE_HEADER_SIZE + _ENTRY_SIZE * len(self.perms) + len(self.value) + names

    def directory(self) -> bytes:
        """The children's names, each with its NUL."""
        return "".join(name + "\0" for name in self.children).encode("latin-1")


@dataclass(slots=True)
class Touched:
    """A path that a transaction read: what it was, what it is to become."""

    before: Node | None
    node: Node | None
    modified: bool = False
    fires: bool = False
    exact: bool = True


@dataclass(slots=True)
class Transaction:
    """An open transaction of one connection; touched paths stand in order of first touch."""

    tx_id: int
    nodes_max: int | None
    """How many paths it may touch; None for dom0."""
    touched: dict[str, Touched] = field(default_factory=dict)
    nodes_added: dict[int, int] = field(default_factory=dict)
    """By owner's domid: nodes created less nodes removed."""
    created: bool = False
    failed: bool = False
    """Something went wrong half-way: it can only be thrown away."""

    def queue_event(self, path: str, exact: bool) -> None:
        """Remember that a commit fires watches for `path`; a wider event swallows an exact one."""
        touched = self.touched[path]
        touched.exact = exact and (touched.exact or not touched.fires)
        touched.fires = True


@dataclass(frozen=True, slots=True)
class Change:
    """One path that a commit changed, for the watches: permissions before, and how to match."""

    path: str
    old_perms: Perms | None
    exact: bool


class Tree:
    """All nodes, and the one generation counter. One thread at a time."""

    def __init__(self, domains: DomainTable, quotas: Quotas) -> None:
        self.generation = 0
        self.nodes: dict[str, Node] = {}
        self._domains = domains
        self._quotas = quotas
        for path, child in (("/", ("tool",)), ("/tool", ("xenstored",)), ("/tool/xenstored", ())):
            self.nodes[path] = Node(b"", DOM0_ONLY, child, self.bump())
            self.count_node(0, 1, None)

    def bump(self) -> int:
        """The next generation."""
        self.generation += 1
        return self.generation

    def read(self, path: str, tx: Transaction | None) -> Node | None:
        """The node as the transaction sees it, None if there is none.

        Raises `XenstoreError` ENOSPC, and fails the transaction, if it touches too many paths.
        """
        if tx is None:
            return self._adjusted(self.nodes.get(path))
        touched = tx.touched.get(path)
        if touched is not None:
            return self._adjusted(touched.node)
        if tx.nodes_max is not None and len(tx.touched) >= tx.nodes_max:
            tx.failed = True
            raise XenstoreError("ENOSPC", f"a transaction may touch {tx.nodes_max} nodes")
        node = self._adjusted(self.nodes.get(path))
        tx.touched[path] = Touched(node, node)
        return node

    def write(self, path: str, node: Node, tx: Transaction | None, limited: bool) -> Node:
        """Store a node that was read before, with a new generation; returns it as stored.

        `limited` applies the node-size quota: `XenstoreError` ENOSPC, which fails a transaction.
        """
        stored = replace(node, generation=self.bump())
        if limited and stored.size >= self._quotas.node_size:
            if tx is not None:
                tx.touched[path].modified = tx.failed = True
            raise XenstoreError("ENOSPC", f"{path} would take {stored.size} bytes")
        if tx is None:
            self.nodes[path] = stored
        else:
            touched = tx.touched[path]
            touched.node = stored
            touched.modified = True
        return stored

    def delete(self, path: str, tx: Transaction | None) -> None:
        """Take away one node that was read before; its parent's list is the caller's business."""
        self.bump()
        self.discard(path, tx)

    def discard(self, path: str, tx: Transaction | None) -> None:
        """Delete a node whose creation is being undone."""
        if tx is None:
            del self.nodes[path]
        else:
            tx.touched[path].node = None
            tx.touched[path].modified = True

    def count_node(self, owner: int, count: int, tx: Transaction | None) -> bool:
        """Account `count` more nodes to their owner; False if there is no such domain."""
        if tx is not None:
            tx.nodes_added[owner] = tx.nodes_added.get(owner, 0) + count
            return True
        domain = self._domains.find_or_add(owner, self.generation)
        if domain is None:
            return False
        domain.nodes += count
        return True

    def walk(self, root: str, tx: Transaction | None) -> Iterator[tuple[str, Node, bool]]:
        """Yield every node at and under `root`: (path, node, whether it is left for good).

        A node comes twice, before and after its children, which are read one by one between.
        Raises `XenstoreError` EIO for a child that is listed and not there: a transaction may see
        a parent as it was and its child as it has become since.
        """
        node = self.read(root, tx)
        stack = [(root, node, iter(node.children))] if node is not None else []
        if node is not None:
            yield root, node, False
        while stack:
            path, node, names = stack[-1]
            name = next(names, None)
            if name is None:
                stack.pop()
                yield path, node, True
                continue
            below = child_path(path, name)
            child = self.read(below, tx)
            if child is None:
                raise XenstoreError("EIO", f"{below} is listed and does not exist")
            stack.append((below, child, iter(child.children)))
            yield below, child, False

    def remove_child(self, path: str, tx: Transaction | None) -> None:
        """Take a removed node's name out of its parent, which was read before.

        Raises `XenstoreError` EIO if it is not in there, for the reason that `walk` gives.
        """
        parent = parent_path(path)
        node = self.read(parent, tx)
        assert node is not None
        name = path[path.rindex("/") + 1 :]
        if name not in node.children:
            raise XenstoreError("EIO", f"{path} exists and {parent} does not list it")
        at = node.children.index(name)
        children = node.children[:at] + node.children[at + 1 :]
        self.write(parent, replace(node, children=children), tx, limited=False)

    def check_counts(self, tx: Transaction, limited: bool) -> None:
        """Whether a commit keeps every owner's number of nodes possible.

        Raises `XenstoreError` ENOSPC over the quota, ENOMEM for an owner that is gone.
        """
        for owner, added in tx.nodes_added.items():
            domain = self._domains.find_or_add(owner, self.generation)
            if domain is None:
                raise XenstoreError("ENOMEM", f"domain {owner} is gone")
            if limited and owner != 0 and domain.nodes + added >= self._quotas.nodes:
                raise XenstoreError("ENOSPC", f"domain {owner} may own {self._quotas.nodes} nodes")

    def commit(self, tx: Transaction) -> Iterator[Change]:
        """Make a transaction's changes one by one, yielding those that watches are to hear of.

        Each is yielded when it and all before it are in place and none after it: a watcher's
        permission is judged by the tree at that moment. Raises `XenstoreError` EAGAIN, before any
        change, if a touched path has changed since it was touched.
        """
        for path, touched in tx.touched.items():
            now = self.nodes.get(path)
            if (now and now.generation) != (touched.before and touched.before.generation):
                raise XenstoreError("EAGAIN", f"{path} was changed meanwhile")
        for path, touched in tx.touched.items():
            if not touched.modified:
                continue
            if touched.node is not None:
                self.nodes[path] = replace(touched.node, generation=self.bump())
            elif touched.before is not None:
                del self.nodes[path]
            if touched.fires:
                old_perms = None if touched.before is None else touched.before.perms
                yield Change(path, old_perms, touched.exact)
        for owner, added in tx.nodes_added.items():
            domain = self._domains.find(owner)
            assert domain is not None
            domain.nodes += added

    def _adjusted(self, node: Node | None) -> Node | None:
        if node is None:
            return None
        perms = self._domains.without_strangers(node.perms, node.generation)
        return node if perms is node.perms else replace(node, perms=perms)
