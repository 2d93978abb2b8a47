# SPDX-License-Identifier: Apache-2.0
"""What a frontend would like; the backend's offer cuts it down at each connection."""

import os
from dataclasses import dataclass

from xvd.blkif.abi import MAX_INDIRECT_SEGMENTS, MAX_SEGMENTS_PER_REQUEST
from xvd.blkif.features import BackendFeatures
from xvd.blkif.nodes import MAX_QUEUES
from xvd.types import PAGE_SIZE
from xvd.xenbus.settings import SettingsBase, setting

RING_PAGE_ORDER_MAX = 6
"""64 pages, 2048 requests. Linux stops at 4, FreeBSD at 5."""
POOL_PAGES = 1056
"""Pages of one queue: what Linux's backend keeps mapped for a ring (max_persistent_grants)."""
LINUX = "blkfront"


@dataclass(frozen=True, slots=True)
class Settings(SettingsBase):
    """Limits and switches under the names of Linux's xen-blkfront, with its defaults.

    Raises `ConfigError` for what is out of range.
    """

    max_queues: int = setting(
        min(4, os.cpu_count() or 1), 1, MAX_QUEUES, "rings for a disk, each with a thread",
        whose=LINUX, usual="4, or the CPUs if fewer",
    )  # fmt: skip
    max_ring_page_order: int = setting(
        0, 0, RING_PAGE_ORDER_MAX, "rings of up to 2^n pages", whose=LINUX
    )
    max_indirect_segments: int = setting(
        32, 0, MAX_INDIRECT_SEGMENTS, "pages in one request; 11 and less: none", whose=LINUX
    )
    feature_persistent: bool = setting(
        True, 0, 1, "use persistent grants where the backend does", whose=LINUX
    )
    trusted: bool = setting(
        True, 0, 1, "0: the backend sees no byte that is not data; the toolstack may say so too",
        whose=LINUX,
    )  # fmt: skip
    pool_pages: int = setting(
        POOL_PAGES, MAX_SEGMENTS_PER_REQUEST, 1 << 20,
        "most pages of one queue; requests wait when all are in use",
    )  # fmt: skip
    page_size: int = setting(
        PAGE_SIZE, PAGE_SIZE, 16 * PAGE_SIZE, "the guest's page, by which requests are cut",
        choices=(PAGE_SIZE, 4 * PAGE_SIZE, 16 * PAGE_SIZE),
    )  # fmt: skip
    answer_timeout: float = setting(
        120, 0, 86400, "seconds without any answer until the disk is given up; 0: for ever"
    )
    poll_us: int | None = setting(
        None, 0, 10_000, "microseconds for which a queue's thread polls before it sleeps, at most",
        usual="what a sleep costs",
    )  # fmt: skip
    holdoff_us: int = setting(
        0, 0, 10_000,
        "microseconds for which a queue's thread sleeps after work without asking for an event, "
        "instead of polling: fewer events and longer latencies, for a load of many requests a "
        "second (with few it costs more CPU than it saves)",
    )  # fmt: skip
    large_sectors: bool = setting(
        False, 0, 1,
        "ask for the backend's `sector-size` as the unit, as QEMU insists on for larger blocks; "
        "never with one that takes no notice, as Linux's: data is written to where it does not "
        "belong",
    )  # fmt: skip

    @property
    def poll_s(self) -> float | None:
        """`poll_us` in seconds; None: as long as a sleep costs."""
        return None if self.poll_us is None else self.poll_us / 1e6

    @property
    def holdoff_s(self) -> float:
        """`holdoff_us` in seconds."""
        return self.holdoff_us / 1e6

    def segments(self, features: BackendFeatures) -> int:
        """Pages of data in one request, by what such a backend offers."""
        return max(
            min(features.max_indirect_segments, self.max_indirect_segments),
            MAX_SEGMENTS_PER_REQUEST,
        )
