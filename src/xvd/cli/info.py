# SPDX-License-Identifier: Apache-2.0
"""``xvd disk info``: what a disk's storage is, and what is being done with it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from xvd.cli import common, output, running
from xvd.cli.life import ask_server

_PATIENCE_S: Final = 10.0
_WORDS: Final = {True: "yes", False: "no"}


def info(
    guest: common.Guest,
    vdev: common.Vdev,
    host: common.HostDir = common.DEFAULT_HOST,
    json: common.Json = False,
) -> int:
    """Show what a disk's storage is and can do, its backups, and the copy that is being made."""
    return running.run(_info(host, guest, vdev, json))


async def _info(host: Path, guest: int, vdev: str, json: bool) -> int:
    found = await ask_server(host, guest, vdev, "info", _PATIENCE_S)
    if json:
        output.print_json(found)
    else:
        output.tell("".join(f"{name:<22} {text}\n" for name, text in _lines(found)))
    return 0


def _lines(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Tell what there is to say, by name; parts of parts are named by both."""
    for name, value in found.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{part}", text) for part, text in _lines(value))
        elif value is not None:
            yield name, _WORDS[value] if isinstance(value, bool) else str(value) or "-"


DISK: Final[dict[str, Callable[..., int]]] = {"info": info}
"""What there is behind ``xvd disk``."""
