# SPDX-License-Identifier: Apache-2.0
"""``xvd stats``: the figures of every disk on an emulated host, once."""

from pathlib import Path
from typing import Final

from xvd.backend.counters import BackCounters
from xvd.cli import common, output, running
from xvd.cli.daemons import ALIVE, Answer, ask_all, complain

_COLUMNS: Final = ("rd_req", "wr_req", "f_req", "ds_req", "oo_req", "rd_sect", "wr_sect", "errors")
_ROW: Final = "{:<14} {:<6} {:<10}"


def stats(host: common.HostDir = common.DEFAULT_HOST, json: common.Json = False) -> int:
    """Print the figures of every disk, by blkback's names; sectors are 512 bytes.

    Asks every daemon of the host, and fails if there is none, or one is dead or hangs: in JSON it
    has null for its disks.
    """
    return running.run(_stats(host, json))


async def _stats(host: Path, json: bool) -> int:
    answers = await ask_all(host, "*", "stats")
    if json:
        output.print_json({answer.daemon: answer.result for answer in answers})
    else:
        output.tell("".join(f"{line.rstrip()}\n" for line in _table(answers)))
    return complain(answers)


def _table(answers: list[Answer]) -> list[str]:
    """A line for each disk of a backend; one for a daemon that does not live."""
    lines = [_ROW.format("daemon", "state", "disk") + "".join(f"{name:>10}" for name in _COLUMNS)]
    for answer in answers:
        if answer.state != ALIVE:
            lines.append(_ROW.format(answer.daemon, answer.state, "-"))
        for disk in answer.result or ():
            if "counters" in disk:
                counts = BackCounters.of(disk["counters"]).numbers()
                figures = "".join(f"{counts[name]:>10}" for name in _COLUMNS)
                lines.append(_ROW.format(answer.daemon, answer.state, disk["disk"]) + figures)
    return lines
