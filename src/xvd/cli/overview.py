# SPDX-License-Identifier: Apache-2.0
"""``xvd --help`` and ``xvd --version``, without typer and rich: both take longer to import than to
start Python, and to look a verb up is no reason to wait.

It looks as typer's help of a verb does: the same panels, colours and words.
"""

import os
import sys
from collections.abc import Sequence
from typing import Final

from xvd import __version__
from xvd.cli.verbs import ABOUT, VERBS

HELP_OPTIONS: Final = ("--help", "-h")
OPTIONS: Final = {
    "--version": "Print the version.",
    "--install-completion": "Install completion for the current shell.",
    "--show-completion": "Show completion for the current shell, to copy it or customize the "
    "installation.",
    ", ".join(HELP_OPTIONS): "Show this message and exit.",
}
USAGE: Final = "xvd [OPTIONS] COMMAND [ARGS]..."

_BOX, _ASCII_BOX = "╭─╮│╰╯", "+-+|++"
_DIM, _BOLD, _NAME, _HEAD = "2", "1", "1;36", "1;33"
"""Colours, as typer has them: borders, the usage, names of options and verbs, and ``Usage:``."""


def answer(arguments: Sequence[str]) -> tuple[str, int] | None:
    """Return what these arguments print, and the exit status; None: a verb has to answer."""
    match list(arguments):
        case ["--version"]:
            return f"xvd {__version__}\n", 0
        case []:
            return _help(), 2
        case [only] if only in HELP_OPTIONS:
            return _help(), 0
    return None


def _help() -> str:
    out = sys.stdout
    coloured = out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    box = _BOX if out.encoding.lower().startswith("utf") else _ASCII_BOX
    return "\n".join(overview(_width(), coloured=coloured, box=box)) + "\n"


def _width() -> int:
    """Columns of the screen, as rich counts them."""
    given = os.environ.get("COLUMNS", "")
    if given.isdigit():
        return max(int(given), 40)
    try:
        return max(os.get_terminal_size().columns, 40)
    except OSError:
        return 80


def overview(width: int, *, coloured: bool, box: str = _BOX) -> list[str]:
    """Return the lines of the help, `width` columns wide."""

    def paint(style: str, text: str) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if coloured else text

    def panel(title: str, rows: dict[str, str]) -> list[str]:
        names = max(map(len, rows))
        room = width - names - 6
        side = paint(_DIM, box[3])
        lines = [
            paint(_DIM, f"{box[0]}{box[1]} {title} {box[1] * (width - len(title) - 5)}{box[2]}")
        ]
        for name, text in rows.items():
            for at, part in enumerate(_wrapped(text, room)):
                shown = paint(_NAME, f"{name if at == 0 else '':<{names}}")
                lines.append(f"{side} {shown}  {part:<{room}} {side}")
        return [*lines, paint(_DIM, f"{box[4]}{box[1] * (width - 2)}{box[5]}")]

    return [
        "",
        f" {paint(_HEAD, 'Usage:')} {paint(_BOLD, USAGE)}",
        "",
        *(f" {line}" for line in _wrapped(ABOUT, width - 2)),
        "",
        *panel("Options", OPTIONS),
        *panel("Commands", {name: line for name, (_, line) in VERBS.items()}),
        "",
    ]


def _wrapped(text: str, room: int) -> list[str]:
    """Return the text in lines of at most `room` columns; textwrap is long to import."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if len(longer) <= room:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
