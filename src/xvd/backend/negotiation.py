# SPDX-License-Identifier: Apache-2.0
"""What a backend agrees on with a frontend that connects, from the nodes of both.

Of the two directories those nodes are read that a backend knows, and of a frontend's no more than
what was offered can make it write.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from xvd.backend.features import agreed_wire_sector
from xvd.backend.settings import Settings
from xvd.blkif.abi import Abi
from xvd.blkif.features import BackendFeatures, promised
from xvd.blkif.nodes import NODES, FrontendConfig, Side, parse_frontend
from xvd.machine.xs.client import XenstoreClient
from xvd.xenbus.directory import read_directory

_NUMBERED = re.compile(r"(ring-ref|queue-)([0-9]{1,4})", re.ASCII)


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
    wire_sector = agreed_wire_sector(config, features, settings)
    return Agreement(config, replace(features, wire_sector=wire_sector), published)


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
