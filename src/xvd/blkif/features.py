# SPDX-License-Identifier: Apache-2.0
"""What a backend offers, one row each: its node, how it is read and written, whether it stands.

The one idea: whoever publishes, reads, promises or withdraws a feature goes by its row, so a new
feature is a new row, a field of `BackendFeatures` and its node in `NODES`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from xvd.blkif.abi import MAX_INDIRECT_SEGMENTS, MAX_SEGMENTS_PER_REQUEST, InfoFlag, XenbusState
from xvd.blkif.nodes import NODES, U32_MAX, NodeChanges, Side, read_number, read_text
from xvd.blkif.operations import ALWAYS_OFFERED, OFFERED_BY
from xvd.errors import PeerProtocolError
from xvd.types import PAGE_SIZE, RING_SECTOR_SIZE

__all__ = [
    "FEATURES",
    "BackendFeatures",
    "Feature",
    "format_backend",
    "format_offer",
    "format_size",
    "offered_operations",
    "parse_backend",
    "parse_offer",
    "promised",
    "useful_indirect",
    "wire_sector_of",
    "without",
]

_NO_INFO: Final = InfoFlag(0)
_OPENING: Final = "opening"
NOT_OPENING: Final = NodeChanges({}, (_OPENING,))
"""What goes with the news that storage which was being opened could not be."""


@dataclass(frozen=True, slots=True)
class BackendFeatures:
    """All that a backend publishes. `sectors` counts 512 bytes; the sizes are in bytes.

    `wire_sector` is how many of those sectors both ends count as one, in ``sectors`` and on the
    ring: 1, but for the dialect that ``feature-large-sector-size`` asks for.
    `max_indirect_segments` is 0 where indirect requests are of no use (11 or fewer).
    """

    sectors: int
    info: InfoFlag = _NO_INFO
    sector_size: int = RING_SECTOR_SIZE
    physical_sector_size: int = RING_SECTOR_SIZE
    flush: bool = True
    barrier: bool = False
    discard: bool = False
    discard_granularity: int = 0
    discard_alignment: int = 0
    discard_secure: bool = False
    persistent: bool = False
    max_indirect_segments: int = 0
    max_ring_page_order: int = 0
    max_queues: int = 1
    wire_sector: int = 1


def wire_sector_of(sector_size: int) -> int:
    """512-byte sectors to one of ``sector-size``; PeerProtocolError for one larger than a page."""
    if sector_size > PAGE_SIZE:
        raise PeerProtocolError(
            f"feature-large-sector-size is 1 and sector-size {sector_size}: no page holds a sector"
        )
    return sector_size // RING_SECTOR_SIZE


def useful_indirect(segments: int) -> int:
    """Pages of an indirect request, 4096 at most; 0 where a direct one has as many."""
    return min(segments, MAX_INDIRECT_SEGMENTS) if segments > MAX_SEGMENTS_PER_REQUEST else 0


def _block(size: int) -> int:
    if size & (size - 1):
        raise PeerProtocolError(f"backend node sector-size holds {size}: it must be a power of two")
    return size


def _flags(info: int) -> InfoFlag:
    return InfoFlag(info & 7)


@dataclass(frozen=True, slots=True)
class Feature:
    """One row. field: of `BackendFeatures`.

    parse: from the node's number, which is in range, to the field. shown: the number to write,
    where that is not the field itself. early: it goes with InitWait, before the frontend allocates.
    needs: the field without which its node is not there. stands: what a predecessor has published
    holds for its successor until the frontend reconnects.
    """

    node: str
    field: str
    parse: Callable[[int], Any] = int
    shown: Callable[["BackendFeatures"], int] | None = None
    early: bool = False
    needs: str = ""
    stands: bool = False

    @property
    def bit(self) -> int:
        """The operation that it offers, among those of `offered_operations`; 0: none."""
        return OFFERED_BY.get(self.node, 0)

    def format(self, features: BackendFeatures) -> str:
        """Return what the node holds: digits, since tapback reads nothing else."""
        return str(int(self.shown(features) if self.shown else getattr(features, self.field)))


FEATURES: Final = (
    Feature("max-ring-page-order", "max_ring_page_order", early=True, stands=True),
    Feature("multi-queue-max-queues", "max_queues", early=True, stands=True),
    Feature(
        "feature-max-indirect-segments", "max_indirect_segments", useful_indirect, early=True,
        stands=True,
    ),
    Feature("sector-size", "sector_size", _block),
    Feature("physical-sector-size", "physical_sector_size"),
    Feature("sectors", "sectors", shown=lambda of: of.sectors // of.wire_sector),
    Feature("info", "info", _flags),
    Feature("feature-flush-cache", "flush", bool, stands=True),
    Feature("feature-barrier", "barrier", bool, stands=True),
    Feature("feature-persistent", "persistent", bool, stands=True),
    Feature("feature-discard", "discard", bool, stands=True),
    Feature(
        "discard-granularity", "discard_granularity", needs="discard",
        shown=lambda of: of.discard_granularity or of.sector_size,
    ),
    Feature("discard-alignment", "discard_alignment", needs="discard"),
    Feature("discard-secure", "discard_secure", bool, needs="discard", stands=True),
)  # fmt: skip
"""In the order in which they are published."""

_OFFERING: Final = tuple(row for row in FEATURES if row.bit)


def parse_offer(
    nodes: Mapping[str, str], *, max_ring_page_order: int, max_queues: int
) -> tuple[int, int]:
    """(ring page order, queues) to allocate: what the backend offers, cut down to our own limits.

    All that may be relied on while the backend is at InitWait. PeerProtocolError for garbage.
    """
    order = read_number(Side.BACKEND, nodes, "max-ring-page-order")
    pages = read_number(Side.BACKEND, nodes, "max-ring-pages")
    if not read_text(nodes, "max-ring-page-order") and pages:
        order = pages.bit_length() - 1
    queues = read_number(Side.BACKEND, nodes, "multi-queue-max-queues")
    return min(order, max_ring_page_order), max(1, min(queues, max_queues))


def parse_backend(nodes: Mapping[str, str], *, large_sectors: bool = False) -> BackendFeatures:
    """Parse what a connected backend published; read anew at every connection, as it may shrink.

    large_sectors: we have written ``feature-large-sector-size``, for one that goes by it.
    ``sectors``, ``info`` and ``sector-size`` are mandatory. PeerProtocolError, naming the node
    and its value, for what is missing or out of range; hints that make no sense are corrected
    (a physical sector smaller than the logical one, more than 4096 indirect segments).
    """
    read = BackendFeatures(
        **{row.field: row.parse(read_number(Side.BACKEND, nodes, row.node)) for row in FEATURES}
    )
    order, queues = parse_offer(nodes, max_ring_page_order=U32_MAX, max_queues=U32_MAX)
    block, physical = read.sector_size, read.physical_sector_size
    wire_sector = wire_sector_of(block) if large_sectors else 1
    return replace(
        read,
        sectors=read.sectors * wire_sector,
        physical_sector_size=block if physical < block or physical & (physical - 1) else physical,
        discard_granularity=read.discard_granularity or (block if read.discard else 0),
        discard_secure=read.discard and read.discard_secure,
        max_ring_page_order=order,
        max_queues=queues,
        wire_sector=wire_sector,
    )


def format_offer(features: BackendFeatures, *, opening: bool = False) -> NodeChanges:
    """The nodes that go with InitWait: what a frontend must know before it allocates.

    Everything else that an instance before us may have published is removed. opening: the storage
    is still being opened, and a toolstack that wants to know what becomes of that waits.
    """
    write = {row.node: row.format(features) for row in FEATURES if row.early}
    if opening:
        write[_OPENING] = "1"
    ours = (
        node.name
        for node in NODES.values()
        if node.side is Side.BACKEND and node.writer in ("backend", "(old backends)")
    )
    return NodeChanges(write, tuple(name for name in ours if name not in write))


def with_offer(features: BackendFeatures, offered: BackendFeatures) -> BackendFeatures:
    """`features` with what went with InitWait as it was `offered`: a frontend may go by that."""
    early = {row.field: getattr(offered, row.field) for row in FEATURES if row.early}
    return replace(features, **early, persistent=offered.persistent)


def format_backend(features: BackendFeatures) -> NodeChanges:
    """The nodes that go with Connected: everything, with ``0`` for what is not offered.

    ``max-ring-pages`` is never written: it would override the order in FreeBSD's frontend.
    """
    there = [row for row in FEATURES if not row.needs or getattr(features, row.needs)]
    gone = tuple(row.node for row in FEATURES if row not in there)
    return NodeChanges({row.node: row.format(features) for row in there}, ("max-ring-pages", *gone))


def promised(features: BackendFeatures, nodes: Mapping[str, str]) -> BackendFeatures:
    """The features of a live connection: ours, but for what a predecessor has published in `nodes`.

    Its frontend acts on those until it reconnects; requests that it may send must be served, also
    by a successor that would have offered less. What the storage cannot do is withdrawn when it
    is asked for. Raises `PeerProtocolError` for nodes that no backend of ours has written.
    """
    was = parse_backend(nodes)
    stands = {row.field: getattr(was, row.field) for row in FEATURES if row.stands}
    # A disk does not shrink under its frontend because an image was cut meanwhile.
    return replace(features, sectors=max(features.sectors, was.sectors), **stands)


def offered_operations(features: BackendFeatures) -> int:
    """The operations that a frontend was told of, as bits for the queue."""
    return ALWAYS_OFFERED | sum(row.bit for row in _OFFERING if getattr(features, row.field))


def without(features: BackendFeatures, bits: int) -> BackendFeatures:
    """The features less those of `bits`, which are those of `offered_operations`."""
    gone = {row.field for row in _OFFERING if row.bit & bits}
    gone |= {row.field for row in _OFFERING if row.needs in gone}
    nothing: dict[str, Any] = dict.fromkeys(gone, False)
    return replace(features, **nothing)


def format_size(sectors: int, wire_sector: int = 1) -> NodeChanges:
    """The nodes of a live resize, to so many 512-byte sectors, of which `wire_sector` count as one.

    ``state`` is repeated so that the frontend's watch fires.
    Only for a backend that is Connected.
    """
    return NodeChanges(
        {"sectors": str(sectors // wire_sector), "state": str(int(XenbusState.CONNECTED))}
    )
