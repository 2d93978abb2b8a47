# SPDX-License-Identifier: Apache-2.0
"""``xvd resize``: another size for a disk, while its guest uses it."""

import asyncio
from pathlib import Path
from typing import Annotated, Final

import typer

from xvd.blkif.vdev import vdev_number
from xvd.cli import common, output, running
from xvd.cli.asking import ask
from xvd.cli.daemons import server_of
from xvd.engines.text import parse_size
from xvd.errors import ConfigError, PeerClosed
from xvd.types import RING_SECTOR_SIZE

RESIZE_S: Final = 60.0
"""For storage to take another size."""


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
    return running.run(_resize(host, guest, vdev_number(vdev), wanted, shrink))


async def _resize(host: Path, guest: int, vdev: int, size: int | None, shrink: bool) -> int:
    socket, figures = await server_of(host, guest, vdev)
    name = figures["disk"]
    if "sectors" not in figures:
        raise PeerClosed(f"{name}: its backend has no storage for it; see xvd list")
    now = figures["sectors"] * RING_SECTOR_SIZE
    if size is not None and size < now and not shrink:
        raise ConfigError(f"{size} bytes are fewer than the {now} of the disk; see --shrink")
    try:
        async with asyncio.timeout(RESIZE_S):
            sectors = await ask(socket, "resize", disk=f"{guest}/{vdev}", size=size, shrink=shrink)
    except TimeoutError:
        raise PeerClosed(f"{name}: its storage has no other size after {RESIZE_S:g} s") from None
    output.tell(f"{sectors * RING_SECTOR_SIZE}\n")
    return 0
