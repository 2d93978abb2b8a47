# SPDX-License-Identifier: Apache-2.0
"""What must hold, watched from outside the code under test.

`ModelDisk` knows for each sector what a read may return. A write that is acknowledged leaves one
possibility; one that failed, or whose frontend died, leaves two; a discard leaves the old one and
zeros. A read may return what was possible at any moment between its start and its end.

It knows as well what may come back when the power is lost: whatever was possible when the last
flush began that was acknowledged, and everything since. A flush holds for all queues.
"""

import sys
from dataclasses import dataclass, field

from xvd.backend.counters import BackCounters
from xvd.types import RING_SECTOR_SIZE

SECTOR = RING_SECTOR_SIZE
_ZERO = 0
_NOTHING: frozenset[int] = frozenset()
_ZEROS = frozenset((_ZERO,))


class CheckFailed(AssertionError):
    """The code under test is wrong; the text says what was seen and what was possible."""


def pattern(tag: int, sector: int) -> bytes:
    """Return what a sector holds after the write `tag`, as no other sector of any write."""
    if tag == _ZERO:
        return bytes(SECTOR)
    return (tag.to_bytes(8, "little") + sector.to_bytes(8, "little")) * (SECTOR // 16)


def tag_of(data: bytes, sector: int) -> int | None:
    """The write that left these bytes; None if they are of no single write to this sector."""
    tag = int.from_bytes(data[:8], "little")
    return tag if data == pattern(tag, sector) else None


@dataclass(slots=True)
class _Span:
    """A read or a write under way. possible: what a read may return, for each of its sectors."""

    first: int
    count: int
    possible: list[frozenset[int]] = field(default_factory=list)
    cut: int = sys.maxsize
    """The shortest that the disk has been meanwhile, sectors."""

    def common(self, first: int, count: int) -> range:
        """The sectors that are also in another range."""
        return range(max(first, self.first), min(first + count, self.first + self.count))


class ModelDisk:
    """What the disk may hold. Changes in flight never overlap: the workload sees to that.

    sectors: its size now; sectors_max: the largest that it will have.
    """

    def __init__(self, sectors: int, sectors_max: int = 0) -> None:
        self.sectors = sectors
        self._possible = [_ZEROS] * max(sectors, sectors_max)
        self._older: dict[int, frozenset[int]] = {}
        """What a loss of power may bring back, of each sector that no flush covers."""
        self._reads: dict[int, _Span] = {}
        self._writes: dict[int, _Span] = {}
        self._flushes: dict[int, list[frozenset[int]]] = {}
        self._tags = 0

    def new_tag(self) -> int:
        """A number that no write has had."""
        self._tags += 1
        return self._tags

    # ---- Writes ----

    def begin_write(self, tag: int, first: int, count: int) -> None:
        """Let reads see it from now on; the tag 0 is a discard's."""
        if tag:
            self._writes[tag] = _Span(first, count)
        self._allow(first, count, frozenset((tag,)))

    def end_write(self, tag: int, first: int, count: int, *, acknowledged: bool) -> None:
        """Acknowledged, it is what is there; otherwise it may be."""
        write = self._writes.pop(tag)
        if not acknowledged:
            return
        for sector in range(first, min(first + count, write.cut)):
            older = self._older.get(sector, _NOTHING) | self._possible[sector]
            self._older[sector] = older - {tag}
            self._possible[sector] = frozenset((tag,))

    def _allow(self, first: int, count: int, tags: frozenset[int]) -> None:
        """Sectors may hold these too, and whoever reads them now may see them."""
        for sector in range(first, first + count):
            self._possible[sector] |= tags
            for flushed in self._flushes.values():
                flushed[sector] |= tags
        for read in self._reads.values():
            for sector in read.common(first, count):
                read.possible[sector - read.first] |= tags

    # ---- Reads ----

    def begin_read(self, key: int, first: int, count: int) -> None:
        """Remember what is possible now."""
        self._reads[key] = _Span(first, count, self._possible[first : first + count])

    def end_read(self, key: int, data: bytes | None) -> None:
        """Check what came; None for a read that failed."""
        read = self._reads.pop(key)
        if data is None:
            return
        for i, possible in enumerate(read.possible):
            sector = read.first + i
            tag = tag_of(bytes(data[i * SECTOR : (i + 1) * SECTOR]), sector)
            if tag not in possible:
                raise CheckFailed(
                    f"sector {sector} reads as write {tag}; possible were {sorted(possible)}"
                )

    def check_content(self, content: bytes, what: str) -> None:
        """Check what a storage holds that the disk has, or has become the same as the disk."""
        for sector in range(self.sectors):
            tag = tag_of(content[sector * SECTOR : (sector + 1) * SECTOR], sector)
            if tag not in self._possible[sector]:
                possible = sorted(self._possible[sector])
                raise CheckFailed(f"sector {sector} of {what} is {tag}; possible were {possible}")

    # ---- Flushes ----

    def begin_flush(self, key: int) -> None:
        """Remember what is there: that is what it has to make durable."""
        self._flushes[key] = list(self._possible)

    def end_flush(self, key: int, *, acknowledged: bool) -> None:
        """Acknowledged, nothing older comes back any more."""
        flushed = self._flushes.pop(key)
        if not acknowledged:
            return
        for sector, older in list(self._older.items()):
            self._set_older(sector, older & flushed[sector])

    def settle(self, first: int, count: int) -> None:
        """Make what is possible there durable: a barrier's own data, once it is acknowledged."""
        for sector in range(first, first + count):
            self._older.pop(sector, None)

    def _set_older(self, sector: int, older: frozenset[int]) -> None:
        older -= self._possible[sector]
        if older:
            self._older[sector] = older
        else:
            self._older.pop(sector, None)

    # ---- What happens to the disk ----

    def resize(self, sectors: int) -> None:
        """Its end is cut off, or zeros are appended; what is under way there may come after it."""
        low, high = sorted((self.sectors, sectors))
        for sector in range(low, high):
            self._older.pop(sector, None)
            self._possible[sector] = _NOTHING
        self._allow(low, high - low, _ZEROS)
        for tag, write in self._writes.items():
            write.cut = min(write.cut, low)
            common = write.common(low, high - low)
            self._allow(common.start, len(common), frozenset((tag,)))
        self.sectors = sectors

    def forget_users(self) -> None:
        """Forget who waited: writes and discards of the dead may have happened or not."""
        self._reads.clear()
        self._writes.clear()
        self._flushes.clear()

    def power_lost(self) -> None:
        """After `forget_users`: what no flush covers is there, or what was there before it."""
        for sector, older in self._older.items():
            self._possible[sector] |= older
        self._older.clear()


def check_balanced(accounting: dict[str, int]) -> None:
    """Check that nothing is left mapped, bound or allocated."""
    left = {name: count for name, count in accounting.items() if count}
    if left:
        raise CheckFailed(f"not given back: {left}")


def check_answered(counters: BackCounters) -> None:
    """Check that every request taken has had exactly one response."""
    if counters.requests != counters.responses or counters.in_flight:
        raise CheckFailed(f"requests and responses differ: {counters}")
