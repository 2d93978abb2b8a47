# SPDX-License-Identifier: Apache-2.0
"""``xvd set`` and ``xvd group``: what running daemons go by, shown and changed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from xvd.backend.iotune import IoTune
from xvd.backend.settings import Settings
from xvd.cli import common, completion, output, running
from xvd.cli.asking import DaemonError
from xvd.cli.daemons import ALIVE, ask_all, complain
from xvd.errors import ConfigError


def tune(
    setting: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME=VALUE...",
            help="What to set; nothing: only show.",
            autocompletion=completion.back_settings,
        ),
    ] = [],  # noqa: B006  typer needs a literal
    disk: Annotated[
        str,
        typer.Option(
            "--disk",
            metavar="DOMID/VDEV",
            help="For this disk only: 1/xvda.",
            autocompletion=completion.disks,
        ),
    ] = "",
    host: common.HostDir = common.DEFAULT_HOST,
    json: common.Json = False,
) -> int:
    """Show or change the settings of the running backends, under xen-blkback's names.

    What can be changed under a guest's hands holds at once, and is marked "live"; the rest from its
    next connection on. A daemon that is started anew begins with its own options again.
    """
    Settings.parse(setting)
    name = common.disk_key(disk) if disk else ""
    return running.run(_tell(host, json, _lines, "set", texts=setting, disk=name))


def group(
    name: Annotated[str, typer.Argument(metavar="GROUP", help="The group; none: show all.")] = "",
    limit: Annotated[
        list[str], typer.Argument(metavar="NAME=VALUE...", help="What to limit; 0: no more.")
    ] = [],  # noqa: B006  typer needs a literal
    host: common.HostDir = common.DEFAULT_HOST,
    json: common.Json = False,
) -> int:
    """Show or change the limits that several disks share, under the names of libvirt's iotune.

    A disk is put into a group by xvd set --disk 1/xvda group_name=GROUP. It holds at once, for all
    disks of the group together; each gets an equal part while all want more. A daemon that is
    started anew begins with its own options again.
    """
    IoTune.parse(limit)
    return running.run(_tell(host, json, _group_lines, "group", name=name, texts=limit))


def _group_lines(living: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A line for each group: its disks, and its limits."""
    for daemon, groups in living.items():
        for name, group in groups.items():
            limits = " ".join(f"{limit}={value}" for limit, value in group["limits"].items())
            disks = " ".join(group["disks"])
            yield f"{daemon:<14} {name:<16} {disks or '-'}; {limits or 'no limits'}\n"


async def _tell(
    host: Path,
    json: bool,
    lines: Callable[[dict[str, Any]], Iterator[str]],
    method: str,
    **params: object,
) -> int:
    """Ask every backend, and print what each goes by now."""
    try:
        answers = await ask_all(host, "backend-*", method, **params)
    except DaemonError as error:
        raise ConfigError(str(error)) from None
    living = {answer.daemon: answer.result for answer in answers if answer.state == ALIVE}
    if json:
        output.print_json(living)
    else:
        output.tell("".join(lines(living)))
    return complain(answers)


def _lines(living: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A line for each setting; "-" for what is left to the machine."""
    live = {name for name, row in Settings.table().items() if row.live}
    for daemon, values in living.items():
        for name, value in values.items():
            shown = "-" if value in (None, "") else value
            when = "live" if name in live else ""
            yield f"{daemon:<14} {name:<32} {shown:>8} {when}".rstrip() + "\n"
