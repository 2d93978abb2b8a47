# SPDX-License-Identifier: Apache-2.0
"""Outside tools: which package each comes from (packages.txt, the one table), and where it is.

Like errors and types, this may be imported by all.
"""

import glob
import os
import shutil
from functools import cache
from pathlib import Path

_TABLE = Path(__file__).with_name("packages.txt")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@cache
def packages() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Each command or file of the table: (its package, what uses it)."""
    rows = [line.split() for line in _TABLE.read_text().splitlines() if line[:1] not in ("#", "")]
    return {name: (package, tuple(users.split(","))) for name, package, users in rows}


def package_of(name: str) -> str:
    """The Debian package of a command or a file; KeyError if the table has it not."""
    return packages()[name][0]


def find_tool(name: str) -> str | None:
    """Return the path of a command or a file, or None; of a pattern's files the last by name."""
    if "/" in name:
        return max(glob.glob(name), default=None)
    return shutil.which(name, path=_PATH)
