# SPDX-License-Identifier: Apache-2.0
"""What must hold, watched from outside the code under test.

`ModelDisk` knows for each sector what a read may return. A write that is acknowledged leaves one
possibility; one that failed, or whose frontend died, leaves two; a discard leaves the old one and
zeros. A read may return what was possible at any moment between its start and its end.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

SECTOR = 512
_ZERO = 0


class CheckFailed(AssertionError):
    """The code under test is wrong; the text says what was seen and what was possible."""


def pattern(tag: int, sector: int) -> bytes:
    """What a sector holds after the write `tag`: every sector of every write is different."""
    if tag == _ZERO:
        return bytes(SECTOR)
    return (tag.to_bytes(8, "little") + sector.to_bytes(8, "little")) * (SECTOR // 16)


def tag_of(data: bytes, sector: int) -> int | None:
    """The write that left these bytes; None if they are of no single write to this sector."""
    tag = int.from_bytes(data[:8], "little")
    return tag if data == pattern(tag, sector) else None


@dataclass(slots=True)
class _Read:
    first: int
    possible: list[set[int]] = field(default_factory=list)


class ModelDisk:
    """What the disk may hold. Writes in flight never overlap: the workload sees to that."""

    def __init__(self, sectors: int) -> None:
        self.sectors = sectors
        self._possible: list[set[int]] = [{_ZERO} for _ in range(sectors)]
        self._reads: dict[int, _Read] = {}
        self._tags = 0

    def new_tag(self) -> int:
        """A number that no write has had."""
        self._tags += 1
        return self._tags

    def begin_write(self, tag: int, first: int, count: int) -> None:
        """From now on a read may see it."""
        for sector in range(first, first + count):
            self._possible[sector] = self._possible[sector] | {tag}
        for read in self._reads.values():
            for sector in self._common(read, first, count):
                read.possible[sector - read.first].add(tag)

    def end_write(self, tag: int, first: int, count: int, *, acknowledged: bool) -> None:
        """Acknowledged, it is what is there; otherwise it may be."""
        if acknowledged:
            for sector in range(first, first + count):
                self._possible[sector] = {tag}

    def begin_read(self, key: int, first: int, count: int) -> None:
        """Remember what is possible now."""
        possible = [set(self._possible[s]) for s in range(first, first + count)]
        self._reads[key] = _Read(first, possible)

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

    def forget_reads(self) -> None:
        """Their frontend died."""
        self._reads.clear()

    @staticmethod
    def _common(read: _Read, first: int, count: int) -> Iterable[int]:
        return range(max(first, read.first), min(first + count, read.first + len(read.possible)))


def check_balanced(books: dict[str, int]) -> None:
    """Nothing may be left mapped, bound or allocated."""
    left = {name: count for name, count in books.items() if count}
    if left:
        raise CheckFailed(f"not given back: {left}")


def check_answered(counters: dict[str, object]) -> None:
    """Every request taken has had exactly one response."""
    if counters["requests"] != counters["responses"] or counters["in_flight"]:
        raise CheckFailed(f"requests and responses differ: {counters}")
