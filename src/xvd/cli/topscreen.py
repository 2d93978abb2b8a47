# SPDX-License-Identifier: Apache-2.0
"""``xvd top`` on a terminal: disks, guests, queues and a heat map, by textual (the extra ``top``).

The screen shows what it is given: it asks no daemon, and knows no time but that of the polls.
"""

import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from rich.console import JustifyMethod
from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import DataTable, Footer, Input, Static, TabbedContent, TabPane

from xvd.cli.daemons import ALIVE
from xvd.cli.rates import (
    Poll,
    Rates,
    guest_of,
    guests_between,
    queues_between,
    rates,
)
from xvd.cli.topheat import KINDS, History, heat_map, room_of

Polls = AsyncIterator[tuple[Poll, Poll]]
Cell = str | int | float

_FIGURES: Final = (
    ("rd/s", "reads", ",.0f"), ("wr/s", "writes", ",.0f"),
    ("rd MB/s", "read_mb", ",.1f"), ("wr MB/s", "write_mb", ",.1f"),
    ("p50 us", "p50_us", ",.0f"), ("p99 us", "p99_us", ",.0f"), ("busy", "in_flight", ","),
    ("errors/s", "errors", ",.1f"), ("refused/s", "refused", ",.1f"),
    ("kept %", "kept_percent", ".0f"),
)  # fmt: skip
"""Head, field of `Rates` and format of the columns that every table has."""
_NAME_MAX: Final = 16
_ILL: Final = "bold red"
_STATES: Final = {"connected": "green", "waiting": "", "closed": "", "paused": "yellow"}
"""Colours of states; of all others it is `_ILL`."""
_TEXTS: Final = frozenset({"disk", "guest", "state"})
_ALARMING: Final = frozenset({"errors/s", "refused/s"})


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table. key: of the disk, guest or queue. names: what the filter looks in."""

    key: str
    cells: tuple[Cell, ...]
    names: str
    figures: Rates | None

    @property
    def values(self) -> tuple[Cell, ...]:
        """Everything to show and to sort by; what is not known sorts as nothing."""
        figures = (getattr(self.figures, name, -1) for _, name, _ in _FIGURES)
        return (*self.cells, *figures)


def _name(poll: Poll, guest: str) -> str:
    """Return what a guest is called, cut to fit; nothing in it moves the cursor."""
    name = "".join(char if char.isprintable() else "?" for char in poll.names.get(guest, ""))
    return name if len(name) <= _NAME_MAX else name[: _NAME_MAX - 1] + "…"


def _names(poll: Poll, path: str) -> str:
    """Return what the filter looks in for a disk: its own name, and its guest's in full."""
    disk = poll.disks[path]
    return f"{disk['disk']} {poll.names.get(guest_of(disk), '')}"


def _natural(value: Cell) -> tuple[Cell, ...]:
    """By which to sort: numbers within a text count as numbers, 2/xvda before 12/xvda."""
    if not isinstance(value, str):
        return (value,)
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", value))


def state_of(poll: Poll, path: str) -> str:
    """Return in one word how a disk stands, the worst first."""
    disk = poll.disks.get(path, {})
    daemon = poll.states[path]
    halted = "held" if disk.get("held") else "paused" if disk.get("paused") else ""
    return daemon if daemon != ALIVE else halted or str(disk.get("state", "")).lower()


def disk_rows(before: Poll, after: Poll) -> Iterator[Row]:
    """Yield a row for each disk, and for each daemon of which no disk is known."""
    for path in after.states:
        disk = after.disks.get(path)
        if disk is None:
            yield Row(path, ("-", path, after.states[path]), path, None)
            continue
        name = _name(after, guest_of(disk))
        row = rates(before.disks.get(path, {}), disk, after.at - before.at)
        yield Row(path, (row.disk, name, state_of(after, path)), _names(after, path), row)


def guest_rows(before: Poll, after: Poll) -> Iterator[Row]:
    """Yield a row for each guest: all its disks."""
    for guest, disks, row in guests_between(before, after):
        name = _name(after, guest)
        number = int(guest) if guest.isdigit() else 0
        names = " ".join(_names(after, path) for path in after.guests[guest])
        yield Row(guest, (number, name, disks), names, row)


def queue_rows(before: Poll, after: Poll) -> Iterator[Row]:
    """Yield a row for each queue of each connected disk."""
    for path, number, row in queues_between(before, after):
        name = _name(after, guest_of(after.disks[path]))
        yield Row(f"{path} {number}", (row.disk, name, number), _names(after, path), row)


@dataclass(frozen=True, slots=True)
class View:
    """A table: its title, the heads of its first columns, and its rows."""

    title: str
    heads: tuple[str, ...]
    rows: Callable[[Poll, Poll], Iterator[Row]]


ROWS_MAX: Final = 300
"""Of a table: building its lines takes a millisecond each, and nobody reads more."""

VIEWS: Final = {
    "disks": View("Disks", ("disk", "guest", "state"), disk_rows),
    "guests": View("Guests", ("number", "guest", "disks"), guest_rows),
    "queues": View("Queues", ("disk", "guest", "queue"), queue_rows),
}
HEAT: Final = "latency"


class RatesTable(DataTable[Text]):
    """A view's table, sorted by one column."""

    def __init__(self, view: View) -> None:
        super().__init__(cursor_type="row", zebra_stripes=True, fixed_columns=1)
        self.view = view
        self.heads = (*view.heads, *(head for head, _, _ in _FIGURES))
        self.sorted_by = 0
        self.descending = False
        self.left_out = 0
        """Rows that there was no room for."""

    def sort_by(self, column: int) -> None:
        """Sort by a column from now on: names upwards, figures downwards; again: the other way."""
        column %= len(self.heads)
        again = column == self.sorted_by
        self.descending = not self.descending if again else column >= len(self.view.heads)
        self.sorted_by = column

    def fill(self, rows: Sequence[Row]) -> None:
        """Show the first of these rows; the cursor stays on the row where it was."""
        chosen, top = self.chosen, self.scroll_y
        ordered = sorted(rows, key=lambda row: _natural(row.key))
        by = self.sorted_by
        ordered.sort(key=lambda row: _natural(row.values[by]), reverse=self.descending)
        self.left_out = max(0, len(ordered) - ROWS_MAX)
        del ordered[ROWS_MAX:]
        lines = [list(self._texts(row)) for row in ordered]
        self.clear(columns=True)
        for number, head in enumerate(self.heads):
            mark = ("▼" if self.descending else "▲") if number == by else ""
            justify: JustifyMethod = "left" if head in _TEXTS else "right"
            width = max((len(head + mark), *(len(line[number]) for line in lines)))
            self.add_column(Text(head + mark, justify=justify), width=width)
        for row, line in zip(ordered, lines, strict=True):
            self.add_row(*line, key=row.key)
        keys = [row.key for row in ordered]
        if chosen in keys:
            self.move_cursor(row=keys.index(chosen), scroll=False)
        self.scroll_to(y=top, animate=False)

    @property
    def chosen(self) -> str:
        """The key of the row that the cursor is on; empty if there is none."""
        if not self.is_valid_row_index(self.cursor_row):
            return ""
        return str(self.coordinate_to_cell_key(self.cursor_coordinate).row_key.value)

    def _texts(self, row: Row) -> Iterator[Text]:
        for head, value in zip(self.view.heads, row.cells, strict=True):
            style = _STATES.get(str(value), _ILL) if head == "state" else ""
            yield Text(str(value), style, justify="right" if isinstance(value, int) else "left")
        for head, name, form in _FIGURES:
            figure = getattr(row.figures, name, None)
            text = "" if figure is None else format(figure, form)
            style = _ILL if figure and head in _ALARMING else "" if figure else "dim"
            yield Text(text, style, justify="right")


class TopScreen(App[int]):
    """The program: `show` runs it. polls: ends when there is nothing more to show."""

    TITLE = "xvd top"
    CSS = """
    #summary { height: 1; padding: 0 1; background: $primary-background; }
    Screen { overflow: hidden; }
    TabbedContent { height: 1fr; }
    #filter { display: none; height: 3; }
    #filter.asked { display: block; }
    TabPane { padding: 0; }
    RatesTable { height: 1fr; scrollbar-size-horizontal: 1; }
    #heat { height: 1fr; padding: 0 1; }
    #about { height: 1; padding: 0 1; color: $text-muted; }
    """
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,ctrl+c", "quit", "Quit", key_display="q", priority=False),
        *(Binding(str(i), f"view('{name}')", name.capitalize(), show=False)
          for i, name in enumerate((*VIEWS, HEAT), 1)),
        Binding("s", "sort(1)", "Sort by next"),
        Binding("S", "sort(-1)", "Sort by previous", show=False),
        Binding("r", "reverse", "Reverse"),
        Binding("slash", "ask_filter", "Filter", key_display="/"),
        Binding("escape", "clear", "All", key_display="esc"),
        Binding("o", "operation", "Operations"),
        Binding("space", "freeze", "Freeze", key_display="space"),
    ]  # fmt: skip

    def __init__(self, polls: Polls, where: str) -> None:
        super().__init__()
        self.status = 0
        self._polls = polls
        self._where = where
        self._failure: Exception | None = None
        self._last: tuple[Poll, Poll] | None = None
        self._history = History()
        self._wanted = ""
        self._frozen = False
        self._disk = ""
        self._kind = 0

    async def show(self) -> int:
        """Run until the user or the polls end it; the exit status. Raises what a poll raised."""
        await self.run_async()
        return self.outcome()

    def outcome(self) -> int:
        """Return the exit status once the program has ended; raise what a poll raised."""
        if self._failure is not None:
            raise self._failure
        return self.status or self.return_code or 0

    def compose(self) -> ComposeResult:
        """Build the screen."""
        yield Static(id="summary")
        with TabbedContent(initial="disks"):
            for number, (name, view) in enumerate(VIEWS.items(), 1):
                with TabPane(f"{number} {view.title}", id=name):
                    yield RatesTable(view)
            with TabPane(f"{len(VIEWS) + 1} Latency", id=HEAT):
                yield Static(id="about")
                yield Static(id="heat")
        yield Input(placeholder="part of a disk's or a guest's name", id="filter")
        yield Footer()

    def on_mount(self) -> None:
        """Begin to follow the polls."""
        self._say_summary()
        self.query_one(TabbedContent).query(RatesTable).first().focus()
        self.run_worker(self._follow(), exit_on_error=False)

    async def _follow(self) -> None:
        try:
            async for before, after in self._polls:
                self.status = after.status
                self._history.add(before, after)
                if not self._frozen:
                    self._last = before, after
                    self._draw()
        except Exception as error:  # told after the terminal is as it was
            self._failure = error
        self.exit()

    # ---- Drawing ----

    def _draw(self) -> None:
        if self._last is not None:
            self._draw_view()
        self._say_summary()

    def _draw_view(self) -> None:
        assert self._last is not None
        view = self.query_one(TabbedContent).active
        if view == HEAT:
            self._draw_heat()
            return
        rows = VIEWS[view].rows(*self._last)
        wanted = self._wanted.casefold()
        self._table.fill([row for row in rows if wanted in row.names.casefold()])

    def _draw_heat(self) -> None:
        kind = list(KINDS)[self._kind]
        disks = self._last[1].disks if self._last else {}
        of = disks[self._disk]["disk"] if self._disk in disks else "all disks"
        about = f"{kind} of {of}   o: other operations"
        about += "   esc: all disks" if self._disk in disks else "   enter on a disk: that one"
        self.query_one("#about", Static).update(Text(about))
        heat = self.query_one("#heat", Static)
        width, height = heat.content_size
        histograms = self._history.histograms(self._disk, KINDS[kind])
        seconds = self._history.seconds(room_of(width))
        heat.update(heat_map(histograms, width, height, seconds))

    def _say_summary(self) -> None:
        words = [self._where]
        if self._last is not None:
            before, after = self._last
            all_of_them = [row for _, _, row in guests_between(before, after)]
            words += [
                f"{len(after.disks)} disks of {len(after.guests)} guests",
                f"{sum(row.reads + row.writes for row in all_of_them):,.0f} requests/s",
                f"{sum(row.read_mb + row.write_mb for row in all_of_them):,.1f} MB/s",
            ]
        if left_out := self._table.left_out:
            words.append(f"{left_out:,} more rows: sort or filter")
        if self._wanted:
            words.append(f"filter: {self._wanted}")
        if self._frozen:
            words.append("FROZEN")
        self.query_one("#summary", Static).update(Text("   ".join(words)))

    @property
    def _table(self) -> RatesTable:
        """The table that is shown; the first one while the heat map is."""
        view = self.query_one(TabbedContent).active
        return self.query_one(f"#{view if view in VIEWS else 'disks'}").query_one(RatesTable)

    # ---- What the user does ----

    def action_view(self, name: str) -> None:
        """Show one of the views."""
        self.query_one(TabbedContent).active = name
        if name in VIEWS:
            self._table.focus()

    def on_tabbed_content_tab_activated(self) -> None:
        """Draw what is shown now."""
        self.call_after_refresh(self._draw)

    def on_resize(self) -> None:
        """Draw again: the heat map goes by the width."""
        self.call_after_refresh(self._draw)

    def action_sort(self, step: int) -> None:
        """Sort by the next column, or by the one before."""
        self._table.sort_by(self._table.sorted_by + step)
        self._draw()

    def action_reverse(self) -> None:
        """Sort the other way round."""
        self._table.sort_by(self._table.sorted_by)
        self._draw()

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        """Sort by the column whose head was clicked."""
        self._table.sort_by(event.column_index)
        self._draw()

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Show the latencies of the disk, or of the queue's disk, that was chosen."""
        path = str(event.row_key.value).partition(" ")[0]
        if self._last is not None and path in self._last[1].disks:
            self._disk = path
            self.action_view(HEAT)

    def action_ask_filter(self) -> None:
        """Let the user write what to look for."""
        asked = self.query_one("#filter", Input)
        asked.add_class("asked")
        asked.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Show the rows that have it, as it is written."""
        self._wanted = event.value.strip()
        self._draw()

    def on_input_submitted(self) -> None:
        """Go back to the table, which stays filtered."""
        self.query_one("#filter", Input).remove_class("asked")
        self._table.focus()

    def action_clear(self) -> None:
        """Show everything again: all rows, and the latencies of all disks."""
        self._disk = ""
        self.query_one("#filter", Input).value = ""
        self.on_input_submitted()
        self._draw()

    def action_operation(self) -> None:
        """Show the latencies of the next kind of request."""
        self._kind = (self._kind + 1) % len(KINDS)
        self._draw()

    def action_freeze(self) -> None:
        """Leave the figures as they are, or let them go on."""
        self._frozen = not self._frozen
        self._draw()

    async def action_quit(self) -> None:
        """End."""
        self.exit()
