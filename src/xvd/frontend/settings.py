# SPDX-License-Identifier: Apache-2.0
"""What a frontend would like; the backend's offer cuts it down at each connection."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from xvd.blkif.abi import MAX_INDIRECT_SEGMENTS, MAX_SEGMENTS_PER_REQUEST
from xvd.blkif.nodes import MAX_QUEUES, BackendFeatures
from xvd.errors import ConfigError
from xvd.types import PAGE_SIZE

RING_PAGE_ORDER_MAX = 6
"""64 pages, 2048 requests. Linux stops at 4, FreeBSD at 5."""
POOL_PAGES = 1056
"""Pages of one queue: what Linux's backend keeps mapped for a ring (max_persistent_grants)."""
RANGES: Final[Mapping[str, tuple[int, int]]] = {
    "max_queues": (1, MAX_QUEUES),
    "max_ring_page_order": (0, RING_PAGE_ORDER_MAX),
    "max_indirect_segments": (0, MAX_INDIRECT_SEGMENTS),
    "feature_persistent": (0, 1),
    "trusted": (0, 1),
    "pool_pages": (MAX_SEGMENTS_PER_REQUEST, 1 << 20),
    "page_size": (PAGE_SIZE, 16 * PAGE_SIZE),
    "answer_timeout": (0, 86400),
    "poll_us": (0, 10_000),
    "large_sectors": (0, 1),
}
"""Each setting's smallest and largest value."""
_PAGE_SIZES: Final = (PAGE_SIZE, 4 * PAGE_SIZE, 16 * PAGE_SIZE)
_WORDS: Final = {"y": 1, "n": 0}


def _queues() -> int:
    return min(4, os.cpu_count() or 1)


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits and switches under the names of Linux's xen-blkfront, with its defaults.

    max_queues: 1 and more; at most 4 and one for each CPU unless said. max_ring_page_order: 0 to 6.
    max_indirect_segments: pages in one request, 11 and less meaning no indirect ones. trusted:
    False shows no byte to the backend that is not data; the toolstack may say so too. pool_pages:
    most pages of one queue; requests wait when they are all in use. page_size: the guest's page by
    which requests are cut, 4096, 16384 or 65536 bytes. answer_timeout: seconds for which a backend
    may leave requests unanswered, all of them, before the disk is given up; 0: for ever, as Linux.
    poll_us: for how long at most a queue's thread polls before it sleeps; None: as suits
    the machine.
    large_sectors: ask the backend to count in its ``sector-size``, as QEMU insists on; with one
    that takes no notice, as Linux's, data is written to where it does not belong.

    Raises `ConfigError` for what is out of range.
    """

    max_queues: int = field(default_factory=_queues)
    max_ring_page_order: int = 0
    max_indirect_segments: int = 32
    feature_persistent: bool = True
    trusted: bool = True
    pool_pages: int = POOL_PAGES
    page_size: int = PAGE_SIZE
    answer_timeout: float = 120
    poll_us: int | None = None
    large_sectors: bool = False

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{name} is {value}; it goes from {low} to {high}")
        if self.page_size not in _PAGE_SIZES:
            raise ConfigError(f"page_size is {self.page_size}; it may be 4096, 16384 or 65536")

    def segments(self, features: BackendFeatures) -> int:
        """Pages of data in one request, by what such a backend offers."""
        return max(
            min(features.max_indirect_segments, self.max_indirect_segments),
            MAX_SEGMENTS_PER_REQUEST,
        )


def parse_settings(texts: Iterable[str]) -> Settings:
    """The defaults changed by ``NAME=VALUE``; Y and N are 1 and 0. Raises `ConfigError`."""
    values: dict[str, int] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or name not in RANGES:
            names = ", ".join(RANGES)
            raise ConfigError(f"{text!r} sets nothing; write NAME=VALUE with one of {names}")
        number = _WORDS.get(value.lower()) if RANGES[name] == (0, 1) else None
        if number is None and not (value.isascii() and value.isdigit()):
            low, high = RANGES[name]
            raise ConfigError(f"{text}: {name} takes a whole number from {low} to {high}")
        values[name] = int(value) if number is None else number
    changes: dict[str, Any] = dict(values)
    for name, number in values.items():
        if RANGES[name] == (0, 1) and number in (0, 1):
            changes[name] = bool(number)
    return replace(Settings(), **changes)
