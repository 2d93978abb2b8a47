# SPDX-License-Identifier: Apache-2.0
"""The daemons of a host, living or not: each has a socket under ``DIR/control``.

A daemon that was killed leaves its socket, and one that hangs answers nothing: both are told from a
living one, and from each other.
"""

import asyncio
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from xvd.blkif.vdev import disk_name
from xvd.cli.asking import ask
from xvd.errors import PeerClosed

ANSWER_S: Final = 3.0
"""In which a living daemon says what it knows."""

ALIVE: Final = "alive"
DEAD: Final = "dead"
HUNG: Final = "hung"
_MEANS: Final = {
    DEAD: "is dead: it has left its socket behind",
    HUNG: f"does not answer within {ANSWER_S:g} s",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of asking a daemon: `state` is one of the three words, `result` of a living one."""

    daemon: str
    socket: Path
    state: str
    result: Any = None


async def ask_one(path: Path, method: str, **params: object) -> Answer:
    """Ask the daemon behind a socket; `DaemonError` if it refuses."""
    try:
        async with asyncio.timeout(ANSWER_S):
            return Answer(path.name, path, ALIVE, await ask(path, method, **params))
    except TimeoutError:
        return Answer(path.name, path, HUNG)
    except PeerClosed:
        return Answer(path.name, path, DEAD)


async def ask_all(host: Path, which: str, method: str, **params: object) -> list[Answer]:
    """Ask every daemon whose name matches `which`, all at once; raises `PeerClosed` without any."""
    paths = sorted((host / "control").glob(which))
    answers = await asyncio.gather(*(ask_one(path, method, **params) for path in paths))
    if not answers:
        raise PeerClosed(f"{host}: no daemon answers; start one: xvd backend --host {host}")
    return list(answers)


def complain(answers: Iterable[Answer]) -> int:
    """Say on stderr which of them do not live; the exit status that this makes."""
    status = 0
    for answer in answers:
        if answer.state != ALIVE:
            sys.stderr.write(f"xvd: {answer.daemon} {_MEANS[answer.state]}\n")
            status = 1
    return status


async def server_of(host: Path, guest: int, vdev: int) -> tuple[Path, dict[str, Any]]:
    """The control socket of the daemon that serves a guest's disk, and the disk's figures.

    Raises `PeerClosed` if none does, and says which daemons there are that do not live.
    """
    answers = await ask_all(host, "backend-*", "stats")
    for answer in answers:
        for figures in answer.result or ():
            if figures["path"].endswith(f"/{guest}/{vdev}"):
                return answer.socket, figures
    others = [f"{it.daemon} {_MEANS[it.state]}" for it in answers if it.state != ALIVE]
    why = "; ".join(others) or "see xvd list, xvd stats"
    raise PeerClosed(f"{disk_name(guest, str(vdev))}: no daemon serves the disk; {why}")
