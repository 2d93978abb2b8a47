# SPDX-License-Identifier: Apache-2.0
"""A heat map of latencies as text: a column for each poll, a row for each power of two."""

from collections import deque
from collections.abc import Sequence
from typing import Final

from rich.text import Text

from xvd.cli.rates import BUCKETS, Poll, counters_of, latency_between

KINDS: Final = {
    "reads and writes": ("read", "write"), "reads": ("read",), "writes": ("write",),
    "flushes": ("flush",), "discards": ("discard",),
}  # fmt: skip
"""Of which requests a heat map is, by its name."""
HISTORY: Final = 300
"""Polls that are remembered."""

_LEVELS: Final = (
    (0.01, "·", "#7a4a12"), (0.05, "░", "#b0670f"), (0.1, "▒", "#b0670f"),
    (0.2, "▒", "#f5a623"), (0.5, "▓", "#f5a623"), (1.0, "█", "#ffd978"),
)  # fmt: skip
"""Up to which share of a poll's requests, and how that looks, in colours and without."""
_UNITS: Final = ("ns", "us", "ms", "s")
_LABEL: Final = "{:>7} "
_ROWS_MIN: Final = 6
_AROUND: Final = 3
"""Lines besides the rows: a head, the time, and the meaning of the cells."""


class History:
    """What was answered between polls, by disk and kind of request; idle disks take no room."""

    def __init__(self) -> None:
        self._columns: deque[tuple[float, dict[tuple[str, str], dict[int, int]]]]
        self._columns = deque(maxlen=HISTORY)

    def add(self, before: Poll, after: Poll) -> None:
        """Remember what came between two polls."""
        cells: dict[tuple[str, str], dict[int, int]] = {}
        for path, disk in after.disks.items():
            a, b = counters_of(before.disks.get(path, {})), counters_of(disk)
            for kind in ("read", "write", "flush", "discard"):
                counts = latency_between(a, b, (kind,))
                if any(counts):
                    cells[path, kind] = {i: n for i, n in enumerate(counts) if n}
        self._columns.append((after.at - before.at, cells))

    def seconds(self, columns: int) -> float:
        """Return how long the last so many polls took."""
        return sum(seconds for seconds, _ in list(self._columns)[-columns:])

    def histograms(self, disk: str, kinds: Sequence[str]) -> list[list[int]]:
        """Return the histogram of each poll, the oldest first; disk: a directory, or "" for all."""
        found = []
        for _, cells in self._columns:
            counts = [0] * BUCKETS
            for (path, kind), cell in cells.items():
                if kind in kinds and disk in ("", path):
                    for bucket, count in cell.items():
                        counts[bucket] += count
            found.append(counts)
        return found


def bound(bucket: int) -> str:
    """Return the upper bound of a bucket for people: 1 us for 1,024 ns, 2 ms for 2^21 ns."""
    power = bucket + 1
    unit = min(power // 10, len(_UNITS) - 1)
    return f"{1 << (power - 10 * unit)} {_UNITS[unit]}"


def rows_of(histograms: Sequence[Sequence[int]], height: int) -> range:
    """Return the buckets to show: those that have something, as many as there is height for.

    What is faster than all of these is shown in the lowest.
    """
    used = [i for counts in histograms for i, count in enumerate(counts) if count]
    low, high = (min(used), max(used)) if used else (10, 10)
    low = max(0, min(low, high - _ROWS_MIN + 1))
    high = max(high, low + _ROWS_MIN - 1)
    return range(max(low, high - max(height, 1) + 1), high + 1)


def room_of(width: int) -> int:
    """Return how many polls a map of this width has room for."""
    return max(1, width - len(_LABEL.format("")))


def heat_map(histograms: Sequence[Sequence[int]], width: int, height: int, seconds: float) -> Text:
    """Draw the last polls, as many as the width has room for; seconds: how long those took."""
    room = room_of(width)
    shown = list(histograms)[-room:]
    rows = rows_of(shown, height - _AROUND)
    text = Text(_LABEL.format("up to") + "\n", no_wrap=True, end="")
    for bucket in reversed(rows):
        text.append(_LABEL.format(bound(bucket)), "bold")
        text.append(" " * (room - len(shown)))
        for counts in shown:
            here = sum(counts[: bucket + 1]) if bucket == rows[0] else counts[bucket]
            text.append(*_cell(here, sum(counts)))
        text.append("\n")
    begin = f"{seconds:.0f} s ago"
    start = room - len(shown)
    text.append(_LABEL.format(""))
    if len(shown) > len(begin) + 4:
        text.append(" " * start + begin + "now".rjust(len(shown) - len(begin)) + "\n")
    else:
        text.append("now".rjust(room) + "\n")
    return text.append_text(_meaning())


def _cell(count: int, all_of_them: int) -> tuple[str, str]:
    """(a character, its colour) of a cell."""
    if not count:
        return " ", ""
    share = count / all_of_them
    return next((glyph, colour) for most, glyph, colour in _LEVELS if share <= most)


def _meaning() -> Text:
    text = Text(_LABEL.format("share"))
    for most, glyph, colour in _LEVELS:
        text.append(glyph * 2, colour)
        text.append(f" to {100 * most:.0f} %   " if most < 1 else " more")
    return text.append(" of a poll's requests")
