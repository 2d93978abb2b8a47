# SPDX-License-Identifier: Apache-2.0
"""What a disk offers to its frontend: by its storage, its settings, and the room on this host."""

from dataclasses import replace

from xvd.backend.budget import Claim
from xvd.backend.settings import Settings
from xvd.blkif.abi import MAX_SEGMENTS_PER_REQUEST, InfoFlag
from xvd.blkif.assignment import BackendAssignment
from xvd.blkif.features import BackendFeatures, useful_indirect, wire_sector_of
from xvd.blkif.nodes import FrontendConfig
from xvd.engines.interface import Engine
from xvd.errors import PeerProtocolError
from xvd.types import RING_SECTOR_SIZE


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
    return BackendFeatures(
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
        persistent=bool(settings.feature_persistent) and not settings.copying,
        max_indirect_segments=settings.indirect_segments_offered,
        max_ring_page_order=settings.max_ring_page_order,
        max_queues=settings.queues_offered,
    )


def claim_of(
    features: BackendFeatures, settings: Settings, config: FrontendConfig | None = None
) -> Claim:
    """Estimate what a connection uses of this host: as agreed, or the most if `config` is None."""
    ring_pages = config.ring_pages if config else 1 << features.max_ring_page_order
    persistent = features.persistent and (config is None or config.persistent)
    return Claim(
        queues=len(config.queues) if config else features.max_queues,
        ring_pages=ring_pages,
        segments=max(features.max_indirect_segments, MAX_SEGMENTS_PER_REQUEST),
        persistent=persistent and not settings.copying,
        kept=settings.persistent_grants_of(ring_pages),
        copying=settings.copying,
        buffer_pages=settings.max_buffer_pages,
    )


def within(features: BackendFeatures, claim: Claim) -> BackendFeatures:
    """The features cut down to what a claim has room for."""
    indirect = min(features.max_indirect_segments, claim.segments)
    return replace(
        features,
        persistent=features.persistent and not claim.copying,
        max_indirect_segments=useful_indirect(indirect),
        max_ring_page_order=claim.ring_pages.bit_length() - 1,
        max_queues=claim.queues,
    )


def agreed_wire_sector(
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
