# SPDX-License-Identifier: Apache-2.0
"""What a backend queue is told once, when it is made."""

from dataclasses import dataclass

from xvd.types import PAGE_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class BackOptions:
    """capacity: sectors of 512 bytes. block_sectors: those of one logical block of the storage;
    a request that begins or ends inside one is refused. wire_sector: how many of them the ring
    counts as one: 1, or block_sectors. read_only: whatever writes is refused. offered: bits of the
    operations that the frontend was told of, 1 << 16 for the secure discard; reads and writes are
    always offered. indirect_max: most segments of an indirect request, 0 to 4096, 0 where they are
    not offered. copying: use grant copy instead of mapping.

    persistent: keep the frontend's grants mapped, at most persistent_max of them, and those that
    were not used for persistent_idle_s seconds (0: for ever) no longer; not with copying.
    max_pages: how many pages of 4096 bytes are kept for copying while no request uses them.
    """

    capacity: int
    block_sectors: int = 1
    wire_sector: int = 1
    read_only: bool = False
    offered: int = 0x3
    indirect_max: int = 0
    copying: bool = False
    persistent: bool = False
    persistent_max: int = 1056
    persistent_idle_s: float = 60.0
    max_pages: int = 1024


@dataclass(frozen=True, slots=True)
class Bucket:
    """One limit, of a `Throttle`. rate: tokens a second, at least 1. kinds: numbers of the
    `blkif.operations.Kind`s that it counts. bytes: a token is a byte; otherwise a request.
    slack_ns: how far it may be exceeded for a moment: what comes in so many nanoseconds.
    """

    rate: int
    kinds: tuple[int, ...]
    bytes: bool
    slack_ns: int

    @property
    def lease(self) -> int:
        """Tokens that a queue takes at a time: those of four milliseconds, if that is a page's
        bytes, or one request."""
        return max(PAGE_SIZE if self.bytes else 1, self.rate // 256)
