# SPDX-License-Identifier: Apache-2.0
"""What an administrator decides about a daemon's disks, under xen-blkback's names and with its
defaults, and how such decisions are written: ``max_queues=4``."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from xvd.backend.budget import Claim
from xvd.blkif.abi import MAX_INDIRECT_SEGMENTS, MAX_SEGMENTS_PER_REQUEST
from xvd.errors import ConfigError

RANGES: Final[dict[str, tuple[int, int]]] = {
    "max_ring_page_order": (0, 6),
    "max_queues": (0, 1024),
    "max_indirect_segments": (0, MAX_INDIRECT_SEGMENTS),
    "feature_persistent": (0, 1),
    "max_persistent_grants": (0, 1 << 20),
    "scale_persistent_grants": (0, 1),
    "persistent_grant_unused_seconds": (0, 1 << 31),
    "max_buffer_pages": (0, 1 << 24),
    "buffer_squeeze_duration_ms": (0, 60_000),
    "log_stats": (0, 1),
    "poll_us": (0, 10_000),
    "large_sectors": (0, 1),
}
"""What may be set by name, and from where to where."""

LIVE: Final = frozenset(
    {
        "max_persistent_grants",
        "scale_persistent_grants",
        "persistent_grant_unused_seconds",
        "max_buffer_pages",
        "buffer_squeeze_duration_ms",
        "log_stats",
    }
)
"""What holds at once; the rest is negotiated, and holds from a frontend's next connection on."""

_WORDS: Final = {"y": 1, "n": 0, "yes": 1, "no": 0, "on": 1, "off": 0}


@dataclass(frozen=True, slots=True)
class Settings:
    """What the administrator decides for every disk of a daemon. Raises `ConfigError`.

    copying: grant copy instead of mapping. state_dir: where the journals of live rings are kept
    for a successor; None keeps none, and then only an idle ring can be taken over.
    max_ring_page_order: rings of up to 2^order pages. max_queues: 0 is one for each CPU of this
    machine. feature_persistent: offer persistent grants; not with grant copy, which maps nothing.
    max_persistent_grants: most that stay mapped for each ring, of any size;
    scale_persistent_grants (not blkback's): for each page of the ring instead.
    persistent_grant_unused_seconds: how long one stays mapped without being used; 0: for ever.
    max_buffer_pages: bounce pages that each ring keeps between requests, with grant copy;
    buffer_squeeze_duration_ms: how long none are kept when memory becomes short.
    max_indirect_segments (a constant there): 11 and less offer no indirect requests.
    log_stats: a line of figures for each disk every ten seconds. poll_us (not blkback's): for how
    long at most a ring's thread polls before it sleeps; None: as suits the machine.
    large_sectors (not blkback's): count in ``sector-size`` units for frontends that ask for it,
    instead of refusing them.
    """

    copying: bool = False
    state_dir: Path | None = None
    max_ring_page_order: int = 4
    max_queues: int = 0
    max_indirect_segments: int = 256
    feature_persistent: int = 1
    max_persistent_grants: int = 1056
    scale_persistent_grants: int = 0
    persistent_grant_unused_seconds: int = 60
    max_buffer_pages: int = 1024
    buffer_squeeze_duration_ms: int = 10
    log_stats: int = 0
    poll_us: int | None = None
    large_sectors: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{name}={value}: it goes from {low} to {high}")

    def changed(self, values: Mapping[str, Any]) -> "Settings":
        """These settings, but for `values`, which `parse_settings` read. Raises `ConfigError`."""
        return replace(self, **values)

    def values(self) -> dict[str, Any]:
        """Return each setting by name; None for what was left to the machine."""
        return {name: getattr(self, name) for name in RANGES}

    def persistent_grants_of(self, ring_pages: int) -> int:
        """How many grants of a ring of so many pages stay mapped."""
        return self.max_persistent_grants * (ring_pages if self.scale_persistent_grants else 1)

    def within(self, claim: Claim) -> "Settings":
        """These settings, as far as a connection's claim has room for them."""
        return replace(
            self,
            copying=claim.copying,
            max_persistent_grants=claim.kept,
            scale_persistent_grants=0,
            max_buffer_pages=claim.buffer_pages,
        )

    @property
    def indirect_segments_offered(self) -> int:
        """``feature-max-indirect-segments``: 0 where indirect requests would be of no use."""
        most = self.max_indirect_segments
        return most if most > MAX_SEGMENTS_PER_REQUEST else 0

    @property
    def queues_offered(self) -> int:
        """``multi-queue-max-queues``."""
        return self.max_queues or os.cpu_count() or 1


def parse_settings(texts: Iterable[str]) -> dict[str, int]:
    """Values by name from ``NAME=VALUE``; Y and N are 1 and 0. Raises `ConfigError`."""
    values: dict[str, int] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or name not in RANGES:
            raise ConfigError(f"{text!r} sets nothing; write NAME=VALUE with one of "
                              f"{', '.join(RANGES)}")  # fmt: skip
        if value.isascii() and value.isdigit():
            values[name] = int(value)
        elif value.lower() in _WORDS and RANGES[name] == (0, 1):
            values[name] = _WORDS[value.lower()]
        else:
            low, high = RANGES[name]
            raise ConfigError(f"{name}={value}: it takes a whole number from {low} to {high}")
    return values
