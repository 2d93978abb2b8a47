# SPDX-License-Identifier: Apache-2.0
"""The full screen of ``xvd top``, by textual's own pilot; polls come when the test gives them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Static, TabbedContent

from xvd.cli.rates import Poll
from xvd.cli.topheat import bound, heat_map, rows_of
from xvd.cli.topscreen import (
    ROWS_MAX,
    RatesTable,
    TopScreen,
    disk_rows,
    guest_rows,
    queue_rows,
)
from xvd.errors import PeerClosed

NAMES = {"1": "web", "2": "database", "12": "mail"}


def histogram(**buckets: int) -> list[int]:
    counts = [0] * 40
    for bucket, count in buckets.items():
        counts[int(bucket.removeprefix("b"))] = count
    return counts


def disk(name: str, reads: int = 0, **more: Any) -> tuple[str, dict[str, Any]]:
    """(a disk's directory, its figures)."""
    counters = {"rd_req": reads, "latency": {"read": histogram(b15=reads)}}
    figures = {"disk": name, "state": "CONNECTED", "counters": counters, "queue_counters": []}
    return f"backend/vbd/{name}", figures | more


def poll(at: float, *disks: tuple[str, dict[str, Any]], **states: str) -> Poll:
    alive = {path: "alive" for path, _ in disks}
    return Poll(at, dict(disks), alive | states, NAMES)


class Feed:
    """Polls as an iterator that the test fills, and the program that shows them."""

    def __init__(self) -> None:
        self._polls: asyncio.Queue[tuple[Poll, Poll] | None] = asyncio.Queue()
        self.program = TopScreen(self._iterate(), "host, every 1 s")
        self.pilot: Pilot[int]

    async def _iterate(self) -> AsyncIterator[tuple[Poll, Poll]]:
        while (pair := await self._polls.get()) is not None:
            yield pair

    async def give(self, before: Poll, after: Poll) -> None:
        """Let the program have a poll, and draw it."""
        self._polls.put_nowait((before, after))
        await self.settle()

    async def press(self, *keys: str) -> None:
        """Press keys, and let the program draw."""
        await self.pilot.press(*keys)
        await self.settle()

    async def settle(self) -> None:
        await self.pilot.pause()
        await self.pilot.pause()

    def end(self) -> None:
        self._polls.put_nowait(None)

    @property
    def table(self) -> RatesTable:
        view = self.program.query_one(TabbedContent).active
        return self.program.query_one(f"#{view}").query_one(RatesTable)

    def column(self, number: int) -> list[str]:
        """The texts of a column of the table that is shown."""
        return [str(cell) for cell in self.table.get_column_at(number)]

    def text(self, name: str) -> str:
        return str(self.program.query_one(f"#{name}", Static).render())


def run(test: Callable[[Feed], Awaitable[None]], size: tuple[int, int] = (130, 30)) -> Feed:
    """Run a test within the program, and then end that."""

    async def main() -> Feed:
        feed = Feed()
        async with feed.program.run_test(size=size) as pilot:
            feed.pilot = pilot
            await test(feed)
            feed.end()
        return feed

    return asyncio.run(main())


BEFORE = poll(0.0, disk("12/xvda"), disk("2/xvda"), disk("1/xvda"))
AFTER = poll(
    2.0,
    disk("12/xvda", 200, queue_counters=[{"rd_req": 150}, {"rd_req": 50}]),
    disk("2/xvda", 4000, held="held until its storage is back"),
    disk("1/xvda", 600),
)


# ---- Rows --------------------------------------------------------------------------------------


def test_a_disks_row_says_whose_it_is_and_how_it_stands() -> None:
    rows = list(disk_rows(BEFORE, AFTER))

    assert [row.cells for row in rows] == [
        ("12/xvda", "mail", "connected"), ("2/xvda", "database", "held"),
        ("1/xvda", "web", "connected"),
    ]  # fmt: skip
    assert [row.figures.reads for row in rows if row.figures] == [100, 2000, 300]


def test_a_daemon_that_is_gone_is_worse_than_what_its_disk_was() -> None:
    path, figures = disk("1/xvda", paused=True)

    [dead] = disk_rows(BEFORE, Poll(1.0, {path: figures}, {path: "dead"}))
    [unknown] = disk_rows(BEFORE, poll(1.0, **{"backend-0": "hung"}))

    assert dead.cells == ("1/xvda", "", "dead")
    assert unknown.cells == ("-", "backend-0", "hung")


def test_a_guests_row_adds_its_disks_up() -> None:
    before = poll(0.0, disk("1/xvda"), disk("1/xvdb"), disk("2/xvda"))
    after = poll(1.0, disk("1/xvda", 5), disk("1/xvdb", 7), disk("2/xvda", 1))

    rows = list(guest_rows(before, after))

    assert [row.cells for row in rows] == [(1, "web", 2), (2, "database", 1)]
    assert [row.figures.reads for row in rows if row.figures] == [12, 1]


def test_a_queues_row_has_its_own_rates() -> None:
    rows = list(queue_rows(BEFORE, AFTER))

    assert [row.cells for row in rows] == [("12/xvda", "mail", 0), ("12/xvda", "mail", 1)]
    assert [row.figures.reads for row in rows if row.figures] == [75, 25]


def test_a_name_of_the_store_does_not_move_the_cursor() -> None:
    after = Poll(1.0, *(AFTER.disks, AFTER.states), {"1": "\x1b[2J" + "x" * 40})

    names = {row.cells[0]: row.cells[1] for row in disk_rows(BEFORE, after)}

    assert names["1/xvda"] == "?[2Jxxxxxxxxxxx…"


# ---- The program -------------------------------------------------------------------------------


@pytest.mark.slow
def test_disks_are_in_the_order_of_their_numbers_until_they_are_sorted() -> None:
    async def test(feed: Feed) -> None:
        await feed.give(BEFORE, AFTER)
        assert feed.column(0) == ["1/xvda", "2/xvda", "12/xvda"]
        assert feed.column(3) == ["300", "2,000", "100"]

        await feed.press("s", "s", "s")

        assert feed.column(3) == ["2,000", "300", "100"]
        await feed.press("r")
        assert feed.column(3) == ["100", "300", "2,000"]
        await feed.press("S", "S", "S", "r")
        assert feed.column(0) == ["12/xvda", "2/xvda", "1/xvda"]

    run(test)


@pytest.mark.slow
def test_views_are_chosen_by_their_numbers() -> None:
    async def test(feed: Feed) -> None:
        await feed.give(BEFORE, AFTER)

        await feed.press("2")
        assert feed.column(1) == ["web", "database", "mail"]

        await feed.press("3")
        assert feed.column(0) == ["12/xvda", "12/xvda"]

        await feed.press("4")
        assert feed.text("about").startswith("reads and writes of all disks")
        assert "64 us" in feed.text("heat")

    run(test)


@pytest.mark.slow
def test_the_filter_finds_disks_and_guests_and_is_taken_back() -> None:
    async def test(feed: Feed) -> None:
        await feed.give(BEFORE, AFTER)

        await feed.press("slash", "D", "a", "t")
        assert feed.column(0) == ["2/xvda"]
        assert "filter: Dat" in feed.text("summary")

        await feed.press("enter", "2")
        assert feed.column(1) == ["database"]

        await feed.press("escape")
        assert feed.column(1) == ["web", "database", "mail"]

    run(test)


@pytest.mark.slow
def test_a_chosen_disk_has_its_own_heat_map() -> None:
    async def test(feed: Feed) -> None:
        await feed.give(BEFORE, AFTER)

        await feed.press("down", "enter")
        assert feed.text("about").startswith("reads and writes of 2/xvda")

        await feed.press("o")
        assert feed.text("about").startswith("reads of 2/xvda")

        await feed.press("escape")
        assert feed.text("about").startswith("reads of all disks")

    run(test)


@pytest.mark.slow
def test_the_cursor_stays_on_its_disk_when_others_come() -> None:
    async def test(feed: Feed) -> None:
        before = poll(0.0, disk("2/xvda"), disk("12/xvda"))
        await feed.give(before, poll(1.0, disk("2/xvda"), disk("12/xvda")))
        await feed.press("down")
        assert feed.table.chosen == "backend/vbd/12/xvda"

        await feed.give(BEFORE, AFTER)

        assert feed.column(0) == ["1/xvda", "2/xvda", "12/xvda"]
        assert feed.table.chosen == "backend/vbd/12/xvda"

    run(test)


@pytest.mark.slow
def test_a_frozen_screen_stays_as_it_is() -> None:
    async def test(feed: Feed) -> None:
        await feed.give(BEFORE, AFTER)
        await feed.press("space")

        await feed.give(AFTER, poll(3.0, disk("1/xvda", 601)))

        assert feed.column(0) == ["1/xvda", "2/xvda", "12/xvda"]
        assert "FROZEN" in feed.text("summary")
        await feed.press("space")
        await feed.give(AFTER, poll(3.0, disk("1/xvda", 601)))
        assert feed.column(0) == ["1/xvda"]

    run(test)


@pytest.mark.slow
def test_of_very_many_disks_the_first_ones_are_shown_in_the_order_that_is_chosen() -> None:
    async def test(feed: Feed) -> None:
        many = [f"{number}/xvda" for number in range(1, ROWS_MAX + 8)]
        before = poll(0.0, *(disk(name) for name in many))
        await feed.give(before, poll(1.0, *(disk(name, reads=i) for i, name in enumerate(many))))
        assert feed.column(0) == many[:ROWS_MAX]
        assert "7 more rows: sort or filter" in feed.text("summary")

        await feed.press("s", "s", "s")

        assert feed.column(0) == many[: -1 - ROWS_MAX : -1]

    run(test)


@pytest.mark.slow
def test_the_summary_adds_everything_up() -> None:
    async def test(feed: Feed) -> None:
        await feed.give(BEFORE, AFTER)

        assert feed.text("summary").split("   ") == [
            "host, every 1 s", "3 disks of 3 guests", "2,400 requests/s", "0.0 MB/s",
        ]  # fmt: skip

    run(test)


@pytest.mark.slow
def test_the_status_is_that_of_the_last_poll() -> None:
    async def test(feed: Feed) -> None:
        await feed.give(BEFORE, AFTER)
        assert feed.program.status == 0

        path, figures = disk("1/xvda")
        await feed.give(AFTER, Poll(3.0, {path: figures}, {path: "dead"}))

    assert run(test).program.status == 1


@pytest.mark.slow
def test_what_a_poll_raises_is_raised_when_the_screen_is_gone() -> None:
    async def polls() -> AsyncIterator[tuple[Poll, Poll]]:
        raise PeerClosed("no daemon answers")
        yield BEFORE, AFTER

    async def main() -> None:
        program = TopScreen(polls(), "host")
        async with program.run_test() as pilot:
            await pilot.pause()
        program.outcome()

    with pytest.raises(PeerClosed, match="no daemon answers"):
        asyncio.run(main())


# ---- The heat map ------------------------------------------------------------------------------


def test_bounds_are_told_in_round_units() -> None:
    assert [bound(i) for i in (8, 9, 10, 19, 20, 29, 39)] == [
        "512 ns", "1 us", "2 us", "1 ms", "2 ms", "1 s", "1024 s",
    ]  # fmt: skip


def test_a_heat_map_has_a_row_for_each_power_of_two_and_a_column_for_each_poll() -> None:
    polls = [histogram(b15=99, b20=1), histogram(b15=10, b20=90)]

    lines = heat_map(polls, 20, 30, 2.0).plain.splitlines()

    assert lines[0] == "  up to "
    assert lines[1:7] == [
        "   2 ms           ·█", "   1 ms             ", " 512 us             ",
        " 256 us             ", " 128 us             ", "  64 us           █▒",
    ]  # fmt: skip
    assert lines[7].endswith("now")
    assert "more of a poll's requests" in lines[8]


def test_a_heat_map_keeps_to_its_room_and_counts_what_is_faster_in_the_lowest_row() -> None:
    polls = [histogram(b5=1, b25=1)] * 50

    lines = heat_map(polls, 30, 9, 50.0).plain.splitlines()

    assert len(lines) == 9
    assert max(map(len, lines[:-1])) == 30
    assert lines[1].endswith("▓" * 22)
    assert lines[6].endswith("▓" * 22)
    assert lines[7].split() == ["50", "s", "ago", "now"]


def test_a_heat_map_of_nothing_has_rows() -> None:
    assert len(rows_of([], 20)) == 6
    assert len(heat_map([], 40, 20, 0.0).plain.splitlines()) == 9
