# SPDX-License-Identifier: Apache-2.0
"""``xvd pause``, ``resume``, ``swap``: a disk's storage, while its guest uses the disk."""

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer

from xvd.blkif.vdev import vdev_number
from xvd.cli import common, running
from xvd.cli.asking import ask
from xvd.cli.daemons import server_of
from xvd.errors import PeerClosed

_MARGIN_S = 30.0
"""For what a daemon does besides waiting for storage to come to rest."""

Patience = Annotated[
    float,
    typer.Option(
        "--timeout", min=0.0,
        help="Seconds for what is in flight to end; then nothing is changed, and the status is 1.",
    ),
]  # fmt: skip


def pause(
    guest: common.Guest,
    vdev: common.Vdev,
    timeout: Patience = 60.0,
    host: common.HostDir = common.DEFAULT_HOST,
) -> int:
    """Let a disk take no more requests, and wait until its storage has none.

    Its guest sees a delay until xvd resume, also from the backend's successor.
    """
    return running.run(_ask(host, guest, vdev, "pause", timeout, timeout_s=timeout))


def resume(
    guest: common.Guest,
    vdev: common.Vdev,
    host: common.HostDir = common.DEFAULT_HOST,
) -> int:
    """Let a paused disk go on."""
    return running.run(_ask(host, guest, vdev, "resume", 0.0))


def swap(
    guest: common.Guest,
    vdev: common.Vdev,
    storage: Annotated[
        str, typer.Argument(metavar="STORAGE", help="An image or a URI, as xvd serve takes it.")
    ],
    timeout: Patience = 60.0,
    abandon: Annotated[
        bool,
        typer.Option(
            "--abandon",
            help="Do not wait for storage that hangs: what it has is done by the new one, and no "
            "late answer of it is believed. What only the old one has is lost to the guest.",
        ),
    ] = False,
    host: common.HostDir = common.DEFAULT_HOST,
) -> int:
    """Give a disk other storage while its guest uses it; what it holds is the caller's affair.

    The new storage has to be at least as large and to do what the guest was told of. Its guest sees
    a delay of milliseconds. The backend's successor opens it too; xl's configuration of the guest
    stays as it is.
    """
    image = common.absolute(storage)
    return running.run(
        _ask(host, guest, vdev, "swap", timeout, image=image, timeout_s=timeout, abandon=abandon)
    )


async def _ask(
    host: Path, guest: int, vdev: str, method: str, patience_s: float, **params: object
) -> int:
    await ask_server(host, guest, vdev, method, patience_s, **params)
    return 0


async def ask_server(
    host: Path, guest: int, vdev: str, method: str, patience_s: float, **params: object
) -> Any:
    """Ask the daemon that serves a disk for something about it; what it answers.

    Raises `PeerClosed` if none serves it or it takes much longer than `patience_s`.
    """
    number = vdev_number(vdev)
    socket, figures = await server_of(host, guest, number)
    try:
        async with asyncio.timeout(patience_s + _MARGIN_S):
            return await ask(socket, method, disk=f"{guest}/{number}", **params)
    except TimeoutError:
        raise PeerClosed(f"{figures['disk']}: its daemon does not answer; see xvd stats") from None
