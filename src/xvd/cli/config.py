# SPDX-License-Identifier: Apache-2.0
"""``xvd config``: the file of a backend's settings, checked and shown."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import typer

from xvd.cli import common, output
from xvd.errors import ConfigError
from xvd.service.configuration import DEFAULT_PATH, Configuration, read, shown

File = Annotated[Path, typer.Argument(metavar="[FILE]", help="The file.")]
_ROW: Final = "{:<18} {:<32} {:>10}  {}\n"


def check(file: File = DEFAULT_PATH) -> int:
    """Check a file of settings. Fails with the line that is wrong, and what is right."""
    try:
        read(file)
    except ConfigError as error:
        common.complain(str(error))
        return 1
    output.tell(f"{file}: it is in order\n")
    return 0


def show(file: File = DEFAULT_PATH, json: common.Json = False) -> int:
    """Show what a backend goes by that is begun with a file of settings, and where each is from.

    Without the file it is what a backend goes by that was told nothing. What running ones go by is
    shown by xvd set.
    """
    found = read(file) if file.exists() or file != DEFAULT_PATH else Configuration()
    rows = list(shown(found))
    if json:
        output.print_json([asdict(row) for row in rows])
        return 0
    for row in rows:
        value = "-" if row.value in (None, "", []) else row.value
        output.tell(_ROW.format(row.table, row.name, _text(value), row.origin))
    return 0


def _text(value: object) -> str:
    """Return a value as a table has it: a switch is 0 or 1, as in xvd set."""
    if isinstance(value, list):
        return ",".join(value)
    return str(int(value) if isinstance(value, bool) else value)


CONFIG: Final[dict[str, Callable[..., int]]] = {"check": check, "show": show}
"""What there is behind ``xvd config``."""
