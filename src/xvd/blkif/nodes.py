# SPDX-License-Identifier: Apache-2.0
"""The xenstore nodes of a disk: who writes them, what they may hold, what they mean.

The one idea: a dict of strings that another domain wrote goes in, and a checked value comes out,
or an error that names the node and shows what it holds. There is no other door: past this file
every number is in range. `NODES` is the table, the functions are its two directions.

Paths are relative to the disk's own directory, backend's or frontend's. A node that is empty
counts as absent. Sources: Xen's blkif.h, libxl_disk.c, Linux xen-blkback and xen-blkfront.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Final

from xvd.blkif.abi import (
    Abi,
    XenbusState,
)
from xvd.errors import PeerProtocolError
from xvd.types import DOMID_FIRST_RESERVED, RING_SECTOR_SIZE, Gref, Port

__all__ = [
    "DIRECTORIES",
    "MAX_RING_PAGE_ORDER",
    "MAX_SECTORS",
    "NODES",
    "FrontendConfig",
    "Node",
    "NodeChanges",
    "QueueConfig",
    "Side",
    "default_abi",
    "format_frontend",
    "parse_frontend",
    "parse_state",
    "read_number",
    "read_text",
    "shown",
    "stale_frontend_nodes",
]

U32_MAX: Final = 0xFFFF_FFFF
MAX_SECTORS: Final = (1 << 63) // RING_SECTOR_SIZE
"""The largest capacity: what a signed 64-bit byte offset reaches."""
MAX_SECTOR_SIZE: Final = 64 * 1024
MAX_RING_PAGE_ORDER: Final = 6
"""Our own limit: 64 pages, 2048 requests. Linux and QEMU stop at 4, FreeBSD at 5."""
MAX_QUEUES: Final = 1024
"""No number of queues beyond this is believed, whatever our own limit is."""
DOMID_MAX: Final = DOMID_FIRST_RESERVED - 1


class Side(Enum):
    """Whose directory a node lies in."""

    BACKEND = "backend"
    FRONTEND = "frontend"


@dataclass(frozen=True, slots=True)
class Node:
    """One row of the table. `writer` is toolstack, hotplug, backend or frontend.

    `low` and `high` bound a number, both included; a node without `high` holds text. `default`
    is what an absent node means; None makes the node mandatory for whoever reads it.
    """

    side: Side
    name: str
    writer: str
    meaning: str
    default: int | str | None = None
    low: int = 0
    high: int | None = None


_backend: Final = partial(Node, Side.BACKEND)
_frontend: Final = partial(Node, Side.FRONTEND)

_B: Final = (
    _backend("frontend", "toolstack", "the frontend's directory"),
    _backend(
        "frontend-id", "toolstack", "its domain: trust this, not the frontend", high=DOMID_MAX
    ),
    _backend("online", "toolstack", "0: go away after closing", 0, high=1),
    _backend("state", "toolstack, then backend", "xenbus state", 0, high=8),
    _backend("removable", "toolstack", "shown to Windows", 0, high=1),
    _backend("bootable", "toolstack", "shown to firmware", 0, high=1),
    _backend("dev", "toolstack", "the disk's name, for threads and logs", ""),
    _backend("type", "toolstack", "phy, qdisk, tap, file", ""),
    _backend("mode", "toolstack", "writable if it contains a w", "r"),
    _backend("device-type", "toolstack", "disk or cdrom", "disk"),
    _backend("params", "toolstack", "where the data is: path or format:path", ""),
    _backend("sm-data", "toolstack", "a directory: what xapi's storage says (xenopsd)", ""),
    _backend("sm-data/xvd-storage", "toolstack", "where the data is, before params", ""),
    _backend("direct-io-safe", "toolstack", "1: O_DIRECT on files is safe", 0, high=1),
    _backend("discard-enable", "toolstack", "0: do not offer discard", 1, high=1),
    _backend("physical-device", "hotplug", "major:minor in hex (Linux)", ""),
    _backend("physical-device-path", "hotplug", "path of the device (FreeBSD, tapback)", ""),
    _backend("hotplug-status", "hotplug", "connected, online, error or busy", ""),
    _backend("hotplug-error", "hotplug", "why", ""),
    _backend("opening", "backend", "1: at InitWait, but the storage is not open yet", 0, high=1),
    _backend("sectors", "backend", "capacity in 512-byte sectors", high=MAX_SECTORS),
    _backend("info", "backend", "1 cdrom, 2 removable, 4 read-only", high=U32_MAX),
    _backend(
        "sector-size", "backend", "logical block, bytes", low=RING_SECTOR_SIZE, high=MAX_SECTOR_SIZE
    ),
    _backend("physical-sector-size", "backend", "hint, bytes; else sector-size", 0, high=U32_MAX),
    _backend("feature-barrier", "backend", "WRITE_BARRIER is served", 0, high=U32_MAX),
    _backend("feature-flush-cache", "backend", "FLUSH_DISKCACHE is served", 0, high=U32_MAX),
    _backend("feature-discard", "backend", "DISCARD is served", 0, high=U32_MAX),
    _backend("discard-granularity", "backend", "bytes; 0: sector-size", 0, high=U32_MAX),
    _backend("discard-alignment", "backend", "bytes to the first boundary", 0, high=U32_MAX),
    _backend("discard-secure", "backend", "secure erase is served", 0, high=U32_MAX),
    _backend("feature-persistent", "backend", "persistent grants", 0, high=U32_MAX),
    _backend("feature-max-indirect-segments", "backend", "0: no INDIRECT", 0, high=U32_MAX),
    _backend("max-ring-page-order", "backend", "largest ring: 2^order pages", 0, high=U32_MAX),
    _backend("max-ring-pages", "(old backends)", "the same as a page count", 0, high=U32_MAX),
    _backend("multi-queue-max-queues", "backend", "most queues", 1, high=U32_MAX),
)
_F: Final = (
    _frontend("backend", "toolstack", "the backend's directory"),
    _frontend("backend-id", "toolstack", "its domain", high=DOMID_MAX),
    _frontend("virtual-device", "toolstack", "the vdev number", high=U32_MAX),
    _frontend(
        "virtual-device-ext", "toolstack", "the vdev, when the other is absent", high=U32_MAX
    ),
    _frontend("device-type", "toolstack", "disk or cdrom", "disk"),
    _frontend("trusted", "toolstack", "0: bounce everything (XSA-403)", 1, high=1),
    _frontend("state", "toolstack, then frontend", "xenbus state", 0, high=8),
    _frontend("protocol", "frontend", "the ABI; absent: see default_abi", ""),
    _frontend("ring-page-order", "frontend", "the ring has 2^order pages", 0, high=U32_MAX),
    _frontend("ring-ref", "frontend", "grant of a one-page ring", high=U32_MAX),
    _frontend("ring-ref0", "frontend", "grant of page 0; also ring-ref1 and on", high=U32_MAX),
    _frontend("num-ring-pages", "(old frontends)", "ignored", 1, high=U32_MAX),
    _frontend("event-channel", "frontend", "port", low=1, high=U32_MAX),
    _frontend("multi-queue-num-queues", "frontend", "queues in queue-N/", 1, low=1, high=U32_MAX),
    _frontend("feature-persistent", "frontend", "persistent grants", 0, high=U32_MAX),
    _frontend("feature-persistent-grants", "(a first draft)", "ignored", 0, high=U32_MAX),
    _frontend("feature-large-sector-size", "frontend", "old Windows dialect", 0, high=U32_MAX),
)

NODES: Final[Mapping[tuple[Side, str], Node]] = {(node.side, node.name): node for node in _B + _F}
"""Every node that xvd reads or writes, by side and name."""

DIRECTORIES: Final = ("queue-", "sm-data")
"""How the names of those nodes begin that have nodes of their own."""

_NUMBER: Final = re.compile(r"([0-9]{1,20})[ \t\r\n\0]{0,8}", re.ASCII)
_SHOWN: Final = 40


def shown(text: str) -> str:
    """Quote what a node holds, cut to a length that an error text can take."""
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")


def read_text(nodes: Mapping[str, str], name: str) -> str:
    """Return a node's text without the blanks and NULs at its end; empty if it is absent."""
    return nodes.get(name, "").rstrip(" \t\r\n\0")


def _number(
    node: Node, nodes: Mapping[str, str], path: str = "", error: type[Exception] = PeerProtocolError
) -> int:
    """The number at `path` (or the node's own name), its default, or `error` naming both."""
    path = path or node.name
    text = nodes.get(path, "")
    if not text.strip(" \t\r\n\0"):
        if node.default is None:
            raise error(f"{node.side.value} node {path} is missing")
        return int(node.default)
    high = U32_MAX if node.high is None else node.high
    match = _NUMBER.fullmatch(text)
    if match is None or not node.low <= int(match[1]) <= high:
        raise error(
            f"{node.side.value} node {path} holds {shown(text)}:"
            f" it must be a decimal number from {node.low} to {high}"
        )
    return int(match[1])


def read_number(
    side: Side, nodes: Mapping[str, str], name: str, error: type[Exception] = PeerProtocolError
) -> int:
    """Return the number in `side`'s node, or its default; raise `error` for any other text."""
    return _number(NODES[side, name], nodes, error=error)


def parse_state(side: Side, text: str | None) -> XenbusState:
    """The value of `side`'s ``state`` node; UNKNOWN when it is missing (None) or empty.

    PeerProtocolError for anything but 0 to 8.
    """
    return XenbusState(read_number(side, {"state": text or ""}, "state"))


def default_abi(host: Abi) -> Abi:
    """The ABI of a frontend that names none: x86_32 on any x86 host, as Linux, tapdisk, QEMU do.

    blkif.h says "native", and FreeBSD and NetBSD follow it; both frontends write the node.
    """
    return Abi.ARM if host is Abi.ARM else Abi.X86_32


@dataclass(frozen=True, slots=True)
class QueueConfig:
    """One queue as a frontend published it: its ring pages in order, and its port."""

    ring_refs: tuple[Gref, ...]
    event_channel: Port


@dataclass(frozen=True, slots=True)
class FrontendConfig:
    """All that a frontend publishes. Every queue has the same power of two of ring pages.

    `large_sector_size` is the key of old Windows drivers that count in ``sector-size`` units, as
    QEMU does; it changes nothing while ``sector-size`` is 512.
    """

    abi: Abi
    queues: tuple[QueueConfig, ...]
    persistent: bool = False
    large_sector_size: bool = False

    @property
    def ring_pages(self) -> int:
        """Pages of each queue's ring."""
        return len(self.queues[0].ring_refs)


def parse_frontend(
    nodes: Mapping[str, str],
    *,
    host_abi: Abi,
    max_ring_page_order: int = MAX_RING_PAGE_ORDER,
    max_queues: int = 1,
) -> FrontendConfig:
    """Parse what a frontend published, from its whole directory (``queue-0/ring-ref`` and so on).

    To be called anew for each connection, on nodes read anew. PeerProtocolError, naming the node
    and its value, for anything that is missing or out of range, for an order or a number of
    queues beyond ours, and for an ABI that nobody has.
    """
    name = read_text(nodes, "protocol")
    try:
        abi = Abi.from_protocol(name) if name else default_abi(host_abi)
    except ValueError as unknown:
        raise PeerProtocolError(f"frontend node protocol: {shown(name)}: {unknown}") from None
    queues = read_number(Side.FRONTEND, nodes, "multi-queue-num-queues")
    if queues > min(max_queues, MAX_QUEUES):
        raise PeerProtocolError(
            f"frontend node multi-queue-num-queues holds {queues}: {max_queues} were offered"
        )
    # One queue lies at the top even when its number is written, as Windows does.
    prefixes = [""] if queues == 1 else [f"queue-{number}/" for number in range(queues)]
    return FrontendConfig(
        abi,
        tuple(_queue(nodes, prefix, max_ring_page_order) for prefix in prefixes),
        read_number(Side.FRONTEND, nodes, "feature-persistent") != 0,
        read_number(Side.FRONTEND, nodes, "feature-large-sector-size") != 0,
    )


def _queue(nodes: Mapping[str, str], prefix: str, max_order: int) -> QueueConfig:
    """Parse one queue. With one page, ``ring-ref`` and ``ring-ref0`` are both accepted.

    Linux and QEMU read ring-ref0 when the order is written as 0, FreeBSD and tapback ring-ref;
    frontends were written against either.
    """
    order = read_number(Side.FRONTEND, nodes, "ring-page-order")
    # Before 1 << order is computed: the order is a number of the guest's choice.
    if order > max_order:
        raise PeerProtocolError(
            f"frontend node ring-page-order holds {order}: at most {max_order} was offered"
        )
    names = [f"ring-ref{page}" for page in range(1 << order)]
    if order == 0:
        spellings = ["ring-ref", "ring-ref0"]
        if read_text(nodes, "ring-page-order"):
            spellings.reverse()
        present = (name for name in spellings if read_text(nodes, prefix + name))
        names = [next(present, "ring-ref")]
    node = NODES[Side.FRONTEND, "ring-ref"]
    refs = tuple(Gref(_number(node, nodes, prefix + name)) for name in names)
    port = _number(NODES[Side.FRONTEND, "event-channel"], nodes, f"{prefix}event-channel")
    return QueueConfig(refs, Port(port))


@dataclass(frozen=True, slots=True)
class NodeChanges:
    """What to do to a directory in one transaction: first remove each of `remove`, then write."""

    write: Mapping[str, str]
    remove: tuple[str, ...] = ()


_OURS_IN_FRONTEND: Final = re.compile(
    r"ring-ref[0-9]{0,4}|ring-page-order|num-ring-pages|event-channel|multi-queue-num-queues"
    r"|queue-[0-9]{1,4}|protocol|feature-persistent(-grants)?|feature-large-sector-size",
    re.ASCII,
)


def stale_frontend_nodes(present: Iterable[str]) -> tuple[str, ...]:
    """Return the children of a frontend directory that some frontend wrote.

    Left in place they mislead the backend of a successor that knows fewer keys; removing a
    ``queue-N`` removes what is below it. The toolstack's nodes are not among them.
    """
    return tuple(sorted(name for name in present if _OURS_IN_FRONTEND.fullmatch(name)))


def format_frontend(config: FrontendConfig, present: Iterable[str] = ()) -> NodeChanges:
    """The nodes that publish `config`, and which of the children `present` must go first.

    One page is written as ``ring-ref`` without an order (QEMU on KVM refuses any order), one
    queue at the top without a number; ``protocol`` always, since its default differs between
    backends.
    """
    write = {
        "protocol": config.abi.protocol,
        "feature-persistent": str(int(config.persistent)),
    }
    if config.large_sector_size:
        write["feature-large-sector-size"] = "1"
    if len(config.queues) > 1:
        write["multi-queue-num-queues"] = str(len(config.queues))
    if config.ring_pages > 1:
        write["ring-page-order"] = str(config.ring_pages.bit_length() - 1)
    for number, queue in enumerate(config.queues):
        prefix = f"queue-{number}/" if len(config.queues) > 1 else ""
        for page, ref in enumerate(queue.ring_refs):
            name = "ring-ref" if config.ring_pages == 1 else f"ring-ref{page}"
            write[prefix + name] = str(ref)
        write[f"{prefix}event-channel"] = str(queue.event_channel)
    return NodeChanges(write, stale_frontend_nodes(present))
