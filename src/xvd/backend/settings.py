# SPDX-License-Identifier: Apache-2.0
"""What an administrator decides about a daemon's disks, under xen-blkback's names and with its
defaults."""

import os
from dataclasses import dataclass
from pathlib import Path

from xvd.backend.iotune import IoTune
from xvd.blkif.abi import MAX_INDIRECT_SEGMENTS
from xvd.blkif.features import useful_indirect
from xvd.xenbus.settings import setting, word_setting

LINUX = "blkback"


@dataclass(frozen=True, slots=True)
class Settings(IoTune):
    """What the administrator decides for every disk of a daemon, its limits too (`IoTune`). Raises
    `ConfigError`.

    copying: grant copy instead of mapping. state_dir: where the journals of live rings are kept
    for a successor; None keeps none, and then only an idle ring can be taken over.
    """

    copying: bool = False
    state_dir: Path | None = None
    max_ring_page_order: int = setting(
        4, 0, 6, "rings of up to 2^n pages, 32 requests each", whose=LINUX
    )
    max_queues: int = setting(
        0, 0, 1024, "rings for a disk, each with a thread; 0: one for each CPU", whose=LINUX
    )
    max_indirect_segments: int = setting(
        256, 0, MAX_INDIRECT_SEGMENTS,
        "pages in one request; 11 and less: none (a constant in blkback)",
    )  # fmt: skip
    feature_persistent: bool = setting(
        True, 0, 1, "offer persistent grants (never with `--copy`)", whose=LINUX
    )
    max_persistent_grants: int = setting(
        1056, 0, 1 << 20, "pages of a frontend's that stay mapped, for each ring", whose=LINUX,
        live=True,
    )  # fmt: skip
    scale_persistent_grants: bool = setting(
        False, 0, 1, "`max_persistent_grants` for each page of a ring", live=True
    )
    persistent_grant_unused_seconds: int = setting(
        60, 0, 1 << 31, "how long one stays mapped without being used; 0: for ever", whose=LINUX,
        live=True,
    )  # fmt: skip
    max_buffer_pages: int = setting(
        1024, 0, 1 << 24, "pages that grant copy keeps between requests, for each ring",
        whose=LINUX, live=True,
    )  # fmt: skip
    buffer_squeeze_duration_ms: int = setting(
        10, 0, 60_000, "how long none are kept when memory becomes short", whose=LINUX, live=True
    )
    log_stats: bool = setting(
        False, 0, 1, "a line of figures every ten seconds (with `-v`)", whose=LINUX, live=True
    )
    on_error: str = word_setting(
        "report", "hold", live=True,
        meaning="of storage that is away or full (EIO, ENOSPC, EDQUOT, ESHUTDOWN, ETIMEDOUT, "
        "ENOTCONN, ECONNABORTED, ENOLINK, ENODEV, ENXIO): report an error to the guest, or hold "
        "the disk and try again until it is back",
    )  # fmt: skip
    poll_us: int | None = setting(
        None, 0, 10_000,
        "microseconds for which a ring's thread polls before it sleeps, at most: by itself as long "
        "as a sleep costs on this machine, and not while others need the CPU. It finds out how "
        "long pays, and never polls on a single CPU",
        usual="what a sleep costs",
    )  # fmt: skip
    holdoff_us: int = setting(
        0, 0, 10_000,
        "microseconds for which a ring's thread sleeps after work without asking for an event, "
        "instead of polling: fewer events and longer latencies, for a load of many requests a "
        "second (with few it costs more CPU than it saves)",
    )  # fmt: skip
    large_sectors: bool = setting(
        False, 0, 1,
        "count in `sector-size` for frontends that write `feature-large-sector-size` (old Windows "
        "drivers, which QEMU goes by), instead of refusing them on disks of larger blocks; only "
        "where no other driver has written to the disk",
    )  # fmt: skip

    def persistent_grants_of(self, ring_pages: int) -> int:
        """How many grants of a ring of so many pages stay mapped."""
        return self.max_persistent_grants * (ring_pages if self.scale_persistent_grants else 1)

    @property
    def holds_errors(self) -> bool:
        """Whether a disk waits for storage that is away."""
        return self.on_error == "hold"

    @property
    def poll_s(self) -> float | None:
        """`poll_us` in seconds; None: as long as a sleep costs."""
        return None if self.poll_us is None else self.poll_us / 1e6

    @property
    def holdoff_s(self) -> float:
        """`holdoff_us` in seconds."""
        return self.holdoff_us / 1e6

    @property
    def indirect_segments_offered(self) -> int:
        """``feature-max-indirect-segments``: 0 where indirect requests would be of no use."""
        return useful_indirect(self.max_indirect_segments)

    @property
    def queues_offered(self) -> int:
        """``multi-queue-max-queues``."""
        return self.max_queues or os.cpu_count() or 1
