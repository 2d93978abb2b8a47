# SPDX-License-Identifier: Apache-2.0
"""``xvd nbd``: a guest's disk as an NBD export."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from xvd.blkif.vdev import parse_vdev
from xvd.cli import common
from xvd.cli.control import ControlServer
from xvd.errors import ConfigError, PeerClosed
from xvd.export.nbd import NbdServer
from xvd.frontend.disk import Disk
from xvd.frontend.settings import Settings, parse_settings
from xvd.types import Domid


def nbd(
    guest: Annotated[int, typer.Argument(min=0, help="The guest's domain number.")],
    vdev: Annotated[str, typer.Argument(help="The disk's name or number: xvda, 51712.")],
    host: common.HostOrXen = None,
    socket: Annotated[
        Path | None,
        typer.Option("--socket", help="Path of the NBD socket (default: a private one)."),
    ] = None,
    tcp: Annotated[str, typer.Option("--tcp", help="Export on TCP as well: [HOST:]PORT.")] = "",
    run: Annotated[
        str, typer.Option("--run", help="Shell command to run with $uri set; its status is ours.")
    ] = "",
    setting: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A setting under the name of xen-blkfront's parameter: max_queues=4, "
            "max_ring_page_order=2, feature_persistent=N. May be given several times.",
        ),
    ] = [],  # noqa: B006  typer needs a literal
    verbose: common.Verbose = 0,
) -> int:
    """Be the frontend of a guest's disk and offer it as an NBD export.

    On real Xen it runs in that guest, in the place of its xen-blkfront.

    Prints the export's URI and serves until SIGINT or SIGTERM, or for the length of --run.
    """
    common.start_logging(verbose)
    try:
        number = parse_vdev(vdev)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    address = common.parse_tcp(tcp) if tcp else None
    settings = parse_settings(setting)
    with common.private_directory() as directory:
        where = socket or directory / "nbd.sock"
        work = _nbd(host, Domid(guest), number, settings, socket=where, tcp=address, command=run)
        return common.run(work)


async def _nbd(
    host: Path | None,
    guest: Domid,
    vdev: int,
    settings: Settings,
    *,
    socket: Path,
    tcp: tuple[str, int] | None,
    command: str,
) -> int:
    stop = common.Stop()
    machine, directory = await common.open_machine(host, guest)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(machine.close)
        store = await machine.xenstore()
        stack.push_async_callback(store.close)
        path = f"device/vbd/{vdev}"
        if not await store.exists(path):
            raise ConfigError(f"guest {guest} has no disk {vdev}; attach it first: xvd attach")
        disk = await stack.enter_async_context(
            await Disk.open(machine, store, path, settings=settings)
        )
        export = NbdServer(disk)
        stack.push_async_callback(export.close)
        await export.listen_unix(socket)
        if tcp is not None:
            await export.listen_tcp(*tcp)
        control = ControlServer({"stats": lambda: [{"disk": path, **disk.statistics().figures()}]})
        await control.listen(directory / "control" / f"nbd-{guest}-{vdev}")
        stack.push_async_callback(control.close)
        if command:
            return await common.run_captive(command, stop, uri=export.uri, unixsocket=str(socket))
        sys.stdout.write(export.uri + "\n")
        sys.stdout.flush()
        if not await stop.wait_or(disk.gone.wait()):
            raise PeerClosed(f"{path}: the disk was removed from guest {guest}")
    return 0
