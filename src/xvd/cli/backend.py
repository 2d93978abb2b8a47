# SPDX-License-Identifier: Apache-2.0
"""``xvd backend``: the daemon that serves every disk assigned to its domain."""

import contextlib
import os
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from xvd.backend.groups import Groups
from xvd.backend.pressure import MemoryPressure
from xvd.backend.rival import no_rival, rival
from xvd.backend.server import Server
from xvd.blkif.assignment import BackendAssignment
from xvd.cli import common, completion, output, running
from xvd.cli.budgets import amounts_of
from xvd.cli.control import ControlServer
from xvd.cli.isolation import (
    Isolation,
    IsolationOption,
    Served,
    follow_orders,
    obey,
    supervise,
)
from xvd.cli.machines import open_machine
from xvd.cli.methods import control_methods
from xvd.cli.storage import Layers
from xvd.cli.wanted import CommandLine, Reloading, Wanted
from xvd.engines.interface import Engine
from xvd.engines.uri import open_assigned
from xvd.errors import ConfigError, PeerClosed
from xvd.files import own_directory
from xvd.machine.xen.machine import XenMachine
from xvd.service.configuration import DEFAULT_PATH, KINDS
from xvd.service.template import Template
from xvd.toolstack.vbd import has_device_model
from xvd.types import Domid
from xvd.xenbus.runner import in_own_thread

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        envvar="XVD_CONFIG",
        help=f"A file of all these settings (default: {DEFAULT_PATH}, if it is there). The "
        "command line stands before it. See xvd config.",
    ),
]


def backend(
    host: common.HostOrXen = None,
    domid: Annotated[
        int | None, typer.Option("--domid", help="The domain it runs in (emulated: 0).")
    ] = None,
    kind: Annotated[
        list[str],
        typer.Option(
            "--kind",
            help="Kinds of backend to serve: backend/KIND/... Default: vbd; on real Xen vbd3, and "
            "vbd where no xen-blkback is loaded.",
        ),
    ] = [],  # noqa: B006  typer needs a literal
    copy: Annotated[bool, typer.Option("--copy", help="Grant copy instead of mapping.")] = False,
    setting: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="[DOMID/VDEV:]NAME=VALUE",
            autocompletion=completion.back_settings,
            help="A setting under the name of xen-blkback's parameter, for every disk or for one: "
            "max_queues=4, 1/xvda:feature_persistent=N. May be given several times. See xvd set.",
        ),
    ] = [],  # noqa: B006  typer needs a literal
    group: Annotated[
        list[str],
        typer.Option(
            "--group",
            metavar="GROUP:NAME=VALUE",
            help="A limit that the disks of a group share: gold:total_iops_sec=5000. A disk is in "
            "it by --set 1/xvda:group_name=gold. May be given several times. See xvd group.",
        ),
    ] = [],  # noqa: B006  typer needs a literal
    layer: Layers = [],  # noqa: B006  typer needs a literal
    isolation: IsolationOption = None,
    config: ConfigOption = None,
    verbose: common.Verbose = 0,
) -> int:
    """Serve the disks that the toolstack assigns to this domain.

    Prints "ready" when it serves, and tells systemd. SIGTERM or SIGINT finishes what is in flight
    and leaves each disk connected for the next backend, which takes its ring up where this one put
    it down. SIGHUP lets it read its file of settings again: a change holds as one by xvd set does,
    what was changed by that is forgotten, and a file that is not in order changes nothing.
    """
    line = CommandLine(config, isolation or "", kind, copy, setting, group, layer, verbose)
    wanted = line.wanted()
    common.start_logging(wanted.verbose)
    number = None if domid is None else Domid(domid)
    served = Served(host, number, line, wanted, Groups(wanted.groups))
    if wanted.isolation == Isolation.SHARED:
        return running.run(_backend(served))
    served = served.alone()
    return running.run(supervise(served, Template(partial(_work, served)), kinds=_kinds))


def _kinds(wanted: list[str], real: bool) -> list[str]:
    """The kinds to serve; `ConfigError` for one that is none, or that has a server already."""
    for kind in wanted:
        if kind not in KINDS:
            raise ConfigError(f"there is no kind {kind!r}; there are {', '.join(KINDS)}")
    if not real:
        return wanted or ["vbd"]
    for kind in wanted or ["vbd3"]:
        if other := rival(kind):
            raise ConfigError(f"backend/{kind} is served by {other}")
    return wanted or (["vbd3"] if rival("vbd") else ["vbd3", "vbd"])


def _work(served: Served, order: dict[str, Any], channel: socket.socket) -> int:
    """Serve one guest, in a process of its own."""
    return running.run(_backend(served, order, channel))


async def _backend(
    served: Served, order: dict[str, Any] | None = None, channel: socket.socket | None = None
) -> int:
    """Serve until a signal comes. order, channel: of the worker for one guest; see `supervise`."""
    wanted = served.wanted
    stop = running.Stop()
    machine, directory = await open_machine(served.host, served.domid)
    os.close(own_directory(directory.resolve(), mode=0o770))  # what is kept there is believed
    name = f"backend-{machine.domid}"
    guests = order["domains"] if order is not None else None
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(machine.close)
        real = isinstance(machine, XenMachine)
        kinds = _kinds(wanted.kinds, real)
        store = await machine.xenstore()
        stack.push_async_callback(store.close)

        async def storage(assignment: BackendAssignment) -> Engine:
            device_model = await has_device_model(store, assignment.frontend_domid)
            opening = partial(
                open_assigned, assignment, layers=wanted.layers, device_model=device_model
            )
            return await in_own_thread(opening)

        states = Path(wanted.state_directory or directory / "state")
        settings = replace(wanted.settings, state_dir=states / name)
        server = Server(
            machine, store, storage, kinds=kinds, guests=guests, settings=settings,
            overrides=wanted.overrides, budget=wanted.lower(amounts_of(machine)),
            groups=served.groups, rival=rival if real else no_rival,
        )  # fmt: skip
        if order is not None:
            obey(server, order)
        control = ControlServer(control_methods(server))
        own = name if guests is None else f"{name}-{guests[0]}"
        await control.listen(directory / "control" / own)
        stack.push_async_callback(control.close)
        stack.callback(MemoryPressure(server.squeeze).close)
        await server.start()
        stack.push_async_callback(server.close)
        if channel is not None:
            stack.callback(follow_orders(server, channel))
        else:
            stop.on_hangup(Reloading(served.line, wanted, partial(_replace, server)))
            await stack.enter_async_context(running.watched())
            output.tell("ready\n")
            running.tell_service_manager(f"READY=1\nSTATUS=serving {', '.join(kinds)}")
        if not await stop.wait_or(server.wait()):
            raise PeerClosed(f"{directory}: the host's xenstore is gone; start it, then this again")
        running.tell_service_manager("STOPPING=1")
    return 0


async def _replace(server: Server, wanted: Wanted) -> None:
    """Let what is wanted now hold for every disk."""
    server.replace(wanted.texts, wanted.overrides, wanted.groups)
