# SPDX-License-Identifier: Apache-2.0
"""``xvd set``: the settings of running daemons, shown and changed."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from xvd.backend.settings import LIVE, parse_settings
from xvd.cli import common
from xvd.cli.control import DaemonError, ask
from xvd.errors import ConfigError, PeerClosed


def tune(
    setting: Annotated[
        list[str], typer.Argument(metavar="NAME=VALUE...", help="What to set; nothing: only show.")
    ] = [],  # noqa: B006  typer needs a literal
    disk: Annotated[
        str, typer.Option("--disk", metavar="DOMID/VDEV", help="For this disk only: 1/xvda.")
    ] = "",
    host: common.HostDir = common.DEFAULT_HOST,
    json: common.Json = False,
) -> int:
    """Show or change the settings of the running backends, under xen-blkback's names.

    What can be changed under a guest's hands holds at once, and is marked "live"; the rest from its
    next connection on. A daemon that is started anew begins with its own options again.
    """
    parse_settings(setting)
    name = common.disk_name(disk) if disk else ""
    return common.run(_tune(host, setting, name, json))


async def _tune(host: Path, texts: list[str], disk: str, json: bool) -> int:
    answers: dict[str, dict[str, Any]] = {}
    for path in sorted((host / "control").glob("backend-*")):
        with contextlib.suppress(PeerClosed):
            try:
                answers[path.name] = await ask(path, "set", texts=texts, disk=disk)
            except DaemonError as error:
                raise ConfigError(str(error)) from None
    if not answers:
        raise PeerClosed(f"{host}: no daemon answers; start one: xvd backend --host {host}")
    if json:
        common.print_json(answers)
        return 0
    for daemon, values in answers.items():
        for name, value in values.items():
            live = "live" if name in LIVE else ""
            sys.stdout.write(f"{daemon:<14} {name:<32} {value:>8} {live}\n")
    return 0
