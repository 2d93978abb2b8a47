# SPDX-License-Identifier: Apache-2.0
"""``xvd stats``: the figures of every disk on an emulated host, once."""

import sys
from pathlib import Path
from typing import Any

from xvd.cli import common
from xvd.cli.control import ask
from xvd.errors import PeerClosed

_COLUMNS = ("rd_req", "wr_req", "f_req", "ds_req", "oo_req", "rd_sect", "wr_sect", "errors")


def stats(host: common.HostDir = common.DEFAULT_HOST, json: common.Json = False) -> int:
    """Print the figures of every disk, by blkback's names; sectors are 512 bytes.

    Asks every daemon of the host; fails if there is none.
    """
    return common.run(_stats(host, json))


async def _stats(host: Path, json: bool) -> int:
    sockets = sorted((host / "control").glob("*"))
    answers: dict[str, list[dict[str, Any]]] = {}
    for path in sockets:
        try:
            answers[path.name] = await ask(path, "stats")
        except PeerClosed:
            continue  # killed, and its socket left behind
    if not answers:
        raise PeerClosed(f"{host}: no daemon answers; start one: xvd backend --host {host}")
    if json:
        common.print_json(answers)
        return 0
    sys.stdout.write(f"{'disk':<28}" + "".join(f"{name:>10}" for name in _COLUMNS) + "\n")
    for disks in answers.values():
        for disk in disks:
            if "counters" in disk:
                figures = "".join(f"{disk['counters'].get(name, 0):>10}" for name in _COLUMNS)
                sys.stdout.write(f"{disk['disk']:<28}{figures}\n")
    return 0
