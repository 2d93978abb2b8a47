# SPDX-License-Identifier: Apache-2.0
"""``xvd resize``: another size for a disk, while its guest uses it."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from xvd.cli import common
from xvd.cli.control import ask
from xvd.engines.uri import parse_size
from xvd.errors import ConfigError


def resize(
    guest: common.Guest,
    vdev: common.Vdev,
    size: Annotated[
        str,
        typer.Argument(
            help="The new size: 10G. Without it, the disk follows what its storage has."
        ),
    ] = "",
    shrink: Annotated[
        bool, typer.Option("--shrink", help="Allow a smaller size: what lies behind it is lost.")
    ] = False,
    host: common.HostDir = common.DEFAULT_HOST,
) -> int:
    """Give a disk another size, and tell its guest; prints the bytes that it has then."""
    wanted = parse_size(size) if size else None
    return common.run(_resize(host, f"{guest}/{common.vdev_number(vdev)}", wanted, shrink))


async def _resize(host: Path, disk: str, size: int | None, shrink: bool) -> int:
    socket = await common.daemon_of(host, disk)
    if size is not None and not shrink:
        disks = await ask(socket, "stats")
        [now] = [it["sectors"] * 512 for it in disks if it["disk"].endswith(f"/{disk}")]
        if size < now:
            raise ConfigError(f"{size} bytes are fewer than the {now} of the disk; see --shrink")
    sectors = await ask(socket, "resize", disk=disk, size=size, shrink=shrink)
    sys.stdout.write(f"{sectors * 512}\n")
    return 0
