# SPDX-License-Identifier: Apache-2.0
"""``xvd backend``: the daemon that serves every disk assigned to its domain."""

import contextlib
import sys
from typing import Annotated

import typer

from xvd.backend.device import Settings
from xvd.backend.server import Server
from xvd.blkif.nodes import BackendAssignment
from xvd.cli import common
from xvd.cli.control import ControlServer
from xvd.cli.report import disk_figures
from xvd.engines.interface import Engine
from xvd.errors import PeerClosed
from xvd.machine.emulated.service import connect
from xvd.types import Domid


def backend(
    host: common.HostDir = common.DEFAULT_HOST,
    domid: Annotated[int, typer.Option("--domid", help="The domain it runs in.")] = 0,
    kind: Annotated[
        list[str], typer.Option("--kind", help="Kinds of backend to serve: backend/KIND/...")
    ] = ["vbd"],  # noqa: B006  typer needs a literal
    copy: Annotated[bool, typer.Option("--copy", help="Grant copy instead of mapping.")] = False,
    layer: common.Layers = [],  # noqa: B006  typer needs a literal
    verbose: common.Verbose = 0,
) -> int:
    """Serve the disks that the toolstack assigns to this domain.

    Prints "ready" when it serves. SIGTERM or SIGINT finishes what is in flight and leaves each disk
    connected for the next backend, which takes its ring up where this one put it down.
    """
    common.start_logging(verbose)
    return common.run(_backend(host, Domid(domid), kind, copy, layer))


async def _backend(
    host: common.HostDir, domid: Domid, kinds: list[str], copy: bool, layers: list[str]
) -> int:
    stop = common.Stop()
    machine = connect(host, domid)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(machine.close)
        store = await machine.xenstore()
        stack.push_async_callback(store.close)

        async def storage(assignment: BackendAssignment) -> Engine:
            return await common.open_assigned(assignment, layers)

        settings = Settings(copying=copy, state_dir=host / "state" / f"backend-{domid}")
        server = Server(machine, store, storage, kinds=kinds, settings=settings)
        control = ControlServer(
            {"stats": lambda: [disk_figures(device) for device in server.devices.values()]}
        )
        await control.listen(host / "control" / f"backend-{domid}")
        stack.push_async_callback(control.close)
        await server.start()
        stack.push_async_callback(server.close)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        if not await stop.wait_or(server.wait()):
            raise PeerClosed(f"{host}: the host is gone; start it again, then this backend")
    return 0
