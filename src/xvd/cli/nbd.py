# SPDX-License-Identifier: Apache-2.0
"""``xvd nbd``: a guest's disk as an NBD export."""

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from xvd import joining
from xvd.blkif.vdev import disk_name
from xvd.cli import common, output, running
from xvd.cli.control import ControlServer
from xvd.errors import PeerClosed
from xvd.export.nbd import NbdServer
from xvd.frontend.disk import Disk
from xvd.frontend.settings import Settings
from xvd.types import Domid

CLOSE_S = 1.5
"""For clients to read their replies, and then for the backend to close, at the end."""


def nbd(
    guest: Annotated[int, typer.Argument(min=0, help="The guest's domain number.")],
    vdev: Annotated[str, typer.Argument(help="The disk's name or number: xvda, 51712.")],
    host: common.HostOrXen = None,
    socket: Annotated[
        Path | None,
        typer.Option("--socket", help="Path of the NBD socket (default: a private one)."),
    ] = None,
    tcp: common.Tcp = "",
    allow_remote: common.Remote = False,
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

    Prints the export's URI, with --tcp that one too, and serves until SIGINT or SIGTERM, or for the
    length of --run.
    """
    common.start_logging(verbose)
    number = common.vdev_number(vdev)
    address = common.parse_tcp(tcp, allow_remote=allow_remote)
    settings = Settings.of(setting)
    with running.private_directory() as directory:
        where = socket or directory / "nbd.sock"
        work = _nbd(host, Domid(guest), number, settings, socket=where, tcp=address, command=run)
        return running.run(work)


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
    machine, directory = await common.open_machine(host, guest)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(machine.close)
        store = await machine.xenstore()
        stack.push_async_callback(store.close)
        path = f"device/vbd/{vdev}"
        await joining.demand_disk(store, guest, vdev)
        disk = await Disk.open(machine, store, path, settings=settings)
        stack.push_async_callback(disk.close, CLOSE_S)
        export = NbdServer(disk)
        stack.push_async_callback(export.close, CLOSE_S)
        await export.listen_unix(socket)
        if tcp is not None:
            await export.listen_tcp(*tcp)
        name = disk_name(guest, path)
        control = ControlServer(
            {"stats": lambda: [{"disk": name, "path": path, **disk.statistics().figures()}]}
        )
        await control.listen(directory / "control" / f"nbd-{guest}-{vdev}")
        stack.push_async_callback(control.close)
        stop = running.Stop(running.GRACE_S)
        stack.callback(stop.hurry)
        if command:
            return await running.run_captive(
                command, stop, **running.variables(export.uris, socket)
            )
        output.tell("".join(f"{uri}\n" for uri in export.uris))
        if not await stop.wait_or(disk.gone.wait()):
            raise PeerClosed(f"{name}: the disk was removed from its guest")
    return 0
