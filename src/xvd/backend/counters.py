# SPDX-License-Identifier: Apache-2.0
"""What a backend's queues count."""

from dataclasses import dataclass, field

from xvd.xenbus.counters import QueueCounters, of_the_moment


@dataclass(frozen=True, slots=True)
class BackCounters(QueueCounters):
    """By blkback's names where it has them; docs/settings.md says what each counts."""

    ds_sect: int = 0
    oo_req: int = 0
    storage_errors: int = 0
    mapped: int = 0
    unmapped: int = 0
    copied: int = 0
    map_calls: int = 0
    unmap_calls: int = 0
    copy_calls: int = 0
    buffer_pages_released: int = 0
    persistent_hits: int = 0
    persistent_misses: int = 0
    persistent_purged: int = 0
    recovered: int = 0
    held: int = 0
    starved: int = 0
    throttled: int = 0
    buffer_pages: int = of_the_moment()
    persistent_grants: int = of_the_moment()
    refusals: dict[str, int] = field(default_factory=dict)
