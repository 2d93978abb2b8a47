# SPDX-License-Identifier: Apache-2.0
"""``xvd serve``: a whole emulated host in one process, from an image to an NBD export."""

import contextlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from xvd.backend.server import Server
from xvd.backend.settings import Settings
from xvd.blkif.nodes import BackendAssignment
from xvd.cli import common
from xvd.cli.control import ControlServer
from xvd.cli.report import account, disk_figures
from xvd.engines.interface import Engine
from xvd.engines.uri import open_engine
from xvd.export.nbd import NbdServer
from xvd.frontend.disk import Disk
from xvd.machine.emulated.service import EmulatedHost
from xvd.toolstack.vbd import attach, create_guest, detach
from xvd.toolstack.xldisk import XlDisk
from xvd.types import Domid

GUEST = Domid(1)


@dataclass(frozen=True, slots=True)
class _Job:
    """What is to be served and how."""

    disk: XlDisk
    engine: Engine
    directory: Path
    command: str
    socket: Path
    tcp: tuple[str, int] | None
    copying: bool
    report: bool


def serve(
    image: Annotated[str, typer.Argument(help="Image file, block device, or engine URI.")],
    run: Annotated[
        str, typer.Option("--run", help="Shell command to run with $uri set; its status is ours.")
    ] = "",
    read_only: Annotated[bool, typer.Option("-r", "--read-only", help="Refuse writes.")] = False,
    socket: Annotated[
        Path | None,
        typer.Option("--socket", help="Path of the NBD socket (default: a private one)."),
    ] = None,
    tcp: Annotated[str, typer.Option("--tcp", help="Export on TCP as well: [HOST:]PORT.")] = "",
    vdev: Annotated[str, typer.Option("--vdev", help="The disk's name in the guest.")] = "xvda",
    copy: Annotated[bool, typer.Option("--copy", help="Grant copy instead of mapping.")] = False,
    layer: common.Layers = [],  # noqa: B006  typer needs a literal
    report: Annotated[
        bool, typer.Option("--report", help="Print an account of what happened at the end.")
    ] = False,
    verbose: common.Verbose = 0,
) -> int:
    """Serve IMAGE through a Xen ring on an emulated host, and offer the disk as an NBD export.

    Without --run it prints the export's URI and serves until SIGINT or SIGTERM.
    """
    common.start_logging(verbose)
    disk = XlDisk(target=image, vdev=vdev, writable=not read_only)
    address = common.parse_tcp(tcp) if tcp else None
    engine = open_engine(image, read_only=read_only, layers=layer)
    with contextlib.ExitStack() as stack:
        stack.callback(engine.close)
        directory = stack.enter_context(common.private_directory())
        where = socket or directory / "nbd.sock"
        job = _Job(disk, engine, directory, run, where, address, copy, report)
        return common.run(_serve(job))


async def _serve(job: _Job) -> int:
    stop = common.Stop()

    async def storage(assignment: BackendAssignment) -> Engine:
        return job.engine

    async with EmulatedHost() as host, contextlib.AsyncExitStack() as stack:
        back = host.machine(Domid(0))
        store = await back.xenstore()
        stack.push_async_callback(store.close)
        host.create_domain(GUEST)
        await create_guest(store, GUEST, "guest")
        backend = Server(
            back, store, storage, settings=Settings(copying=job.copying),
            budget=common.budget_of(back),
        )  # fmt: skip
        await backend.start()
        stack.push_async_callback(backend.close)
        vbd = await attach(store, GUEST, job.disk)
        front = host.machine(GUEST)
        guest_store = await front.xenstore()
        stack.push_async_callback(guest_store.close)
        path = f"device/vbd/{vbd.vdev}"
        async with await Disk.open(front, guest_store, path) as opened:
            export = NbdServer(opened)
            stack.push_async_callback(export.close)
            await export.listen_unix(job.socket)
            if job.tcp is not None:
                await export.listen_tcp(*job.tcp)
            device = backend.devices[f"backend/vbd/{GUEST}/{vbd.vdev}"]
            control = ControlServer({"stats": lambda: [disk_figures(device, opened)]})
            await control.listen(job.directory / "control" / "serve")
            stack.push_async_callback(control.close)
            begun = time.monotonic()
            status = await _use(job.command, stop, export.uri, str(job.socket))
            await export.close()
            if job.report:
                sys.stderr.write(account(disk_figures(device, opened), time.monotonic() - begun))
        with contextlib.suppress(OSError):
            await detach(store, vbd)
    return status


async def _use(command: str, stop: common.Stop, uri: str, socket: str) -> int:
    if command:
        return await common.run_captive(command, stop, uri=uri, unixsocket=socket)
    sys.stdout.write(uri + "\n")
    sys.stdout.flush()
    await stop.wait()
    return 0
