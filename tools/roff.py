# SPDX-License-Identifier: Apache-2.0
"""A man page, line by line: plain text in, roff out. Used by print_man.py.

In a text, what stands between backticks is bold, and so are options (``--run``) and names of other
pages (``xvd.toml(5)``).
"""

import email.utils
import re
import textwrap
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
COLUMNS: Final = 78
MANUALS: Final = {1: "User commands", 5: "File formats", 7: "Miscellanea"}

_MARKED: Final = re.compile(
    r"``?(?P<code>[^`]+)``?"
    r"|(?<![\w-])(?P<option>--?[a-z][\w-]*)"
    r"|(?P<page>\b[a-z][\w.-]*)(?P<number>\([1-8]\))"
)


def literal(text: str) -> str:
    """Return a text whose characters all mean themselves."""
    return text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("~", "\\(ti")


def bold(text: str) -> str:
    """Return a text in bold."""
    return f"\\fB{literal(text)}\\fP"


def italic(text: str) -> str:
    """Return a text in italics."""
    return f"\\fI{literal(text)}\\fP"


def prose(text: str) -> str:
    """Return a text in lines, with its marks."""
    lines = textwrap.wrap(_marked(text), COLUMNS, break_long_words=False, break_on_hyphens=False)
    return "\n".join(map(_line, lines))


def _marked(text: str) -> str:
    done, at = "", 0
    for match in _MARKED.finditer(text):
        done += literal(text[at : match.start()])
        done += bold(match["code"] or match["option"] or match["page"]) + (match["number"] or "")
        at = match.end()
    return done + literal(text[at:])


def _line(text: str) -> str:
    """Return a line that is no request, whatever it begins with."""
    return f"\\&{text}" if text.startswith(".") else text


def date() -> str:
    """Return the date of the newest entry of debian/changelog."""
    text = (ROOT / "debian" / "changelog").read_text(encoding="utf-8")
    _, _, trailer = next(it for it in text.splitlines() if it.startswith(" -- ")).rpartition(">")
    return email.utils.parsedate_to_datetime(trailer.strip()).date().isoformat()


class Page:
    """One page; it begins with its name and what it is about."""

    def __init__(self, name: str, number: int, about: str) -> None:
        self.name, self.number = name, number
        self._lines: list[str] = []
        self.section("NAME")
        self.raw(f"{literal(name)} \\- {literal(about)}")

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.name}.{self.number}"

    def raw(self, *lines: str) -> None:
        """Add lines of roff."""
        self._lines += [line for line in lines if line]

    def section(self, title: str) -> None:
        """Begin a section."""
        self.raw(f".SH {_quoted(title)}")

    def subsection(self, title: str) -> None:
        """Begin a section of a section."""
        self.raw(f".SS {_quoted(title)}")

    def paragraph(self, text: str) -> None:
        """Add a paragraph; the first of a section needs no mark."""
        self._begin()
        self.raw(prose(text))

    def _begin(self) -> None:
        if not self._lines[-1].startswith((".SH", ".SS")):
            self.raw(".PP")

    def item(self, head: str, text: str) -> None:
        """Add an item of a list; its head is roff."""
        self.raw(".TP", head, prose(text) or "\\&")

    def code(self, text: str) -> None:
        """Add lines that are shown as they are."""
        self._begin()
        self.raw(".RS 4", ".nf", *(_line(literal(it)) for it in text.splitlines()), ".fi", ".RE")

    def text(self, version: str) -> str:
        """Return the page's roff."""
        about = (self.name.upper(), str(self.number)), (version, MANUALS[self.number])
        before, behind = (" ".join(map(_quoted, words)) for words in about)
        head = [
            '.\\" SPDX-License-Identifier: Apache-2.0',
            '.\\" Made by tools/print_man.py.',
            f".TH {before} {date()} {behind}",
            *(".nh", ".ad l"),  # names are not cut in two, and lines not stretched
        ]
        return "\n".join([*head, *self._lines]) + "\n"


def _quoted(text: str) -> str:
    """Return a text as one argument of a request."""
    escaped = literal(text).replace('"', '""')
    return f'"{escaped}"'
