# SPDX-License-Identifier: Apache-2.0
"""What an administrator decides about a daemon's disks."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Settings:
    """What the administrator decides for every disk of a daemon.

    copying: grant copy instead of mapping. state_dir: where the journals of live rings are kept
    for a successor; None keeps none, and then only an idle ring can be taken over.
    max_ring_page_order: 0 to 6; rings of up to 2^order pages (xen-blkback: 4). max_queues: 1 to
    1024, or 0 for one for each CPU of this machine, as xen-blkback does.
    feature_persistent: offer persistent grants; not with grant copy, which maps nothing.
    max_persistent_grants: most that stay mapped for each ring (xen-blkback: 1056, of any size);
    scale_persistent_grants: for each page of the ring instead.
    persistent_grant_unused_seconds: how long one stays mapped without being used; 0: for ever.
    max_buffer_pages: bounce pages that each ring keeps between requests, with grant copy (1024);
    buffer_squeeze_duration_ms: how long none are kept when memory becomes short (10).
    max_indirect_segments: 0 (no indirect requests), or 12 to 4096; xen-blkback has 256.
    """

    copying: bool = False
    state_dir: Path | None = None
    max_ring_page_order: int = 4
    max_queues: int = 0
    max_indirect_segments: int = 256
    feature_persistent: bool = True
    max_persistent_grants: int = 1056
    scale_persistent_grants: bool = False
    persistent_grant_unused_seconds: float = 60
    max_buffer_pages: int = 1024
    buffer_squeeze_duration_ms: float = 10

    def persistent_grants_of(self, ring_pages: int) -> int:
        """How many grants of a ring of so many pages stay mapped."""
        return self.max_persistent_grants * (ring_pages if self.scale_persistent_grants else 1)

    @property
    def queues_offered(self) -> int:
        """``multi-queue-max-queues``."""
        return self.max_queues or os.cpu_count() or 1
