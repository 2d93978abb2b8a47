# SPDX-License-Identifier: Apache-2.0
"""What a backend offers, and what it agrees on with a frontend, from the nodes of both.

Of the two directories those nodes are read that a backend knows, and of a frontend's no more than
what was offered can make it write.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from xvd.backend.settings import Settings
from xvd.blkif.abi import Abi, InfoFlag
from xvd.blkif.assignment import BackendAssignment
from xvd.blkif.features import BackendFeatures, promised, wire_sector_of
from xvd.blkif.nodes import NODES, FrontendConfig, Side, parse_frontend
from xvd.engines.interface import Engine
from xvd.errors import PeerProtocolError
from xvd.machine.xs.client import XenstoreClient
from xvd.types import RING_SECTOR_SIZE
from xvd.xenbus.directory import read_directory

_NUMBERED = re.compile(r"(ring-ref|queue-)([0-9]{1,4})", re.ASCII)


def features_of(
    engine: Engine, assignment: BackendAssignment, settings: Settings
) -> BackendFeatures:
    """Decide what a backend offers, from its storage, the toolstack's wishes and the settings."""
    info = engine.info
    read_only = info.read_only or not assignment.writable
    discard = info.can_discard and assignment.discard_enable and not read_only
    flags = InfoFlag(0)
    if read_only:
        flags |= InfoFlag.READONLY
    if assignment.cdrom:
        flags |= InfoFlag.CDROM | InfoFlag.REMOVABLE
    return replace(
        announced_features(settings),
        sectors=info.size // RING_SECTOR_SIZE,
        info=flags,
        sector_size=info.logical_block_size,
        physical_sector_size=max(info.logical_block_size, info.physical_block_size),
        flush=info.can_flush,
        barrier=info.can_flush,
        discard=discard,
        discard_secure=discard and info.can_secure_discard,
        discard_granularity=info.discard_granularity,
        discard_alignment=info.discard_alignment,
    )


def announced_features(settings: Settings) -> BackendFeatures:
    """Decide what a disk offers whose storage is not open yet: what goes with InitWait."""
    return BackendFeatures(
        sectors=0,
        persistent=bool(settings.feature_persistent) and not settings.copying,
        max_indirect_segments=settings.indirect_segments_offered,
        max_ring_page_order=settings.max_ring_page_order,
        max_queues=settings.queues_offered,
    )


@dataclass(frozen=True, slots=True)
class Agreement:
    """config: what the frontend published. features: what it was promised. published: the number
    in ``sectors`` that it was told before, where it was connected to a predecessor."""

    config: FrontendConfig
    features: BackendFeatures
    published: str | None = None

    @property
    def has_grown(self) -> bool:
        """Whether the disk has another size than a connected frontend was told."""
        told = str(self.features.sectors // self.features.wire_sector)
        return self.published is not None and self.published != told


async def negotiate(
    store: XenstoreClient,
    path: str,
    frontend: str,
    features: BackendFeatures,
    settings: Settings,
    *,
    resume: bool,
) -> Agreement:
    """Read what both have published, anew for each connection.

    path, frontend: the two directories. features: what was offered. resume: the frontend is
    connected to a predecessor, whose promises stand. Raises `PeerProtocolError` or `XenstoreError`.
    """
    published = None
    if resume:
        own = await read_directory(store, path, own_node)
        features = promised(features, own)
        published = own.get("sectors")
    nodes = await read_directory(store, frontend, frontends_node(features))
    config = parse_frontend(
        nodes,
        host_abi=Abi.native(),
        max_ring_page_order=features.max_ring_page_order,
        max_queues=features.max_queues,
    )
    wire_sector = _agreed_wire_sector(config, features, settings)
    return Agreement(config, replace(features, wire_sector=wire_sector), published)


def _agreed_wire_sector(
    config: FrontendConfig, features: BackendFeatures, settings: Settings
) -> int:
    """How many 512-byte sectors count as one; `PeerProtocolError` where the frontend means others.

    Sectors on the ring are of 512 bytes whatever ``sector-size`` says (Xen 221f2748e8). Drivers
    that write ``feature-large-sector-size`` meant ``sector-size`` units: what they write would lie
    where another driver does not look, and over what it has there. Only the administrator knows
    that no other driver uses the disk.
    """
    if not config.large_sector_size or features.sector_size == RING_SECTOR_SIZE:
        return 1
    if not settings.large_sectors:
        raise PeerProtocolError(
            f"frontend node feature-large-sector-size is 1: it counts sectors of "
            f"{features.sector_size} bytes where blkif counts 512; update the driver, serve the "
            f"disk from storage of 512-byte blocks, or, if no other driver has written to it, set "
            f"large_sectors=1"
        )
    return wire_sector_of(features.sector_size)


def own_node(name: str) -> bool:
    """Whether a child of the backend's own directory is read."""
    return (Side.BACKEND, name) in NODES


def frontends_node(offer: BackendFeatures) -> Callable[[str], bool]:
    """Whether a child of a frontend's directory, or of one of its queues', is read.

    A guest may fill its directory with as many nodes as its quota allows: reading it has to cost
    no more for that.
    """
    limits = {"ring-ref": 1 << offer.max_ring_page_order, "queue-": offer.max_queues}

    def wanted(name: str) -> bool:
        numbered = _NUMBERED.fullmatch(name)
        if numbered is None:
            return (Side.FRONTEND, name) in NODES
        return int(numbered[2]) < limits[numbered[1]]

    return wanted
