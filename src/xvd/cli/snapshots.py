# SPDX-License-Identifier: Apache-2.0
"""``xvd snapshot``: states of a disk that its storage keeps."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final

import typer

from xvd.cli import common, output, running
from xvd.cli.life import Patience, ask_server

Name = Annotated[str, typer.Argument(metavar="NAME", help="The snapshot's name.")]


def create(
    guest: common.Guest,
    vdev: common.Vdev,
    name: Name,
    timeout: Patience = 60.0,
    host: common.HostDir = common.DEFAULT_HOST,
) -> int:
    """Keep the state that a disk has now; its storage has to be qcow2 or rbd.

    It is that of one moment: as after a loss of power. The guest sees a delay.
    """
    return running.run(_change(host, guest, vdev, "create", name, timeout))


def delete(
    guest: common.Guest,
    vdev: common.Vdev,
    name: Name,
    timeout: Patience = 60.0,
    host: common.HostDir = common.DEFAULT_HOST,
) -> int:
    """Remove a snapshot. The guest sees a delay."""
    return running.run(_change(host, guest, vdev, "delete", name, timeout))


def revert(
    guest: common.Guest,
    vdev: common.Vdev,
    name: Name,
    timeout: Patience = 60.0,
    host: common.HostDir = common.DEFAULT_HOST,
) -> int:
    """Let a paused disk have the state of a snapshot again; what it has now is lost.

    A guest that has the disk mounted would mix the two: it has to be shut down, or to have
    unmounted it.
    """
    return running.run(_change(host, guest, vdev, "revert", name, timeout))


def show(
    guest: common.Guest,
    vdev: common.Vdev,
    host: common.HostDir = common.DEFAULT_HOST,
    json: common.Json = False,
) -> int:
    """List a disk's snapshots, oldest first."""
    return running.run(_list(host, guest, vdev, json))


async def _change(
    host: Path, guest: int, vdev: str, action: str, name: str, timeout_s: float
) -> int:
    await ask_server(
        host, guest, vdev, "snapshot", timeout_s, action=action, name=name, timeout_s=timeout_s
    )
    return 0


async def _list(host: Path, guest: int, vdev: str, json: bool) -> int:
    found = await ask_server(host, guest, vdev, "snapshots", 10.0)
    if json:
        output.print_json(found)
        return 0
    for one in found:
        when = datetime.fromtimestamp(one["created"]).astimezone().isoformat(" ", "seconds")
        output.tell(f"{one['name']:<32} {when}\n")
    return 0


SNAPSHOT: Final[dict[str, Callable[..., int]]] = {
    "create": create,
    "list": show,
    "delete": delete,
    "revert": revert,
}
"""What there is behind ``xvd snapshot``."""
