# SPDX-License-Identifier: Apache-2.0
"""``xvd nbd``: a guest's disk as an NBD export."""

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from xvd import joining
from xvd.blkif.vdev import disk_name, vdev_number
from xvd.cli import common, completion, running, serving
from xvd.cli.control import ControlServer
from xvd.cli.machines import open_machine
from xvd.errors import PeerClosed
from xvd.export.nbd import NbdServer
from xvd.frontend.disk import Disk
from xvd.frontend.settings import Settings
from xvd.types import Domid

CLOSE_S = 1.5
"""For clients to read their replies, and then for the backend to close, at the end."""


def nbd(
    guest: common.Guest,
    vdev: common.Vdev,
    host: common.HostOrXen = None,
    socket: serving.Socket = None,
    tcp: common.Tcp = "",
    allow_remote: common.Remote = False,
    tls_creds: serving.TlsCreds = None,
    tls_verify_peer: serving.VerifyPeer = False,
    export_name: serving.ExportName = "",
    pidfile: serving.PidFile = None,
    exit_with_parent: serving.ExitWithParent = False,
    run: serving.Run = "",
    setting: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            autocompletion=completion.front_settings,
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
    if exit_with_parent:
        running.end_with_parent()
    number = vdev_number(vdev)
    settings = Settings.of(setting)
    with running.private_directory() as directory:
        places = serving.places(
            directory, socket=socket, tcp=tcp, allow_remote=allow_remote, tls_creds=tls_creds,
            verify_peer=tls_verify_peer, pidfile=pidfile, command=run,
        )  # fmt: skip
        return running.run(_nbd(host, Domid(guest), number, settings, places, export_name))


async def _nbd(
    host: Path | None,
    guest: Domid,
    vdev: int,
    settings: Settings,
    places: serving.Places,
    export_name: str,
) -> int:
    machine, directory = await open_machine(host, guest)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(machine.close)
        store = await machine.xenstore()
        stack.push_async_callback(store.close)
        path = f"device/vbd/{vdev}"
        await joining.demand_disk(store, guest, vdev)
        disk = await Disk.open(machine, store, path, settings=settings)
        stack.push_async_callback(disk.close, CLOSE_S)
        export = NbdServer(disk, name=export_name)
        stack.push_async_callback(export.close, CLOSE_S)
        await places.listen(export)
        name = disk_name(guest, path)
        control = ControlServer(
            {"stats": lambda: [{"disk": name, "path": path, **disk.statistics().figures()}]}
        )
        await control.listen(directory / "control" / f"nbd-{guest}-{vdev}")
        stack.push_async_callback(control.close)
        stop = running.Stop(running.GRACE_S)
        stack.callback(stop.hurry)
        with places.told():
            status = await places.use(export, stop)
            if status is None and not await stop.wait_or(disk.gone.wait()):
                raise PeerClosed(f"{name}: the disk was removed from its guest")
    return status or 0
