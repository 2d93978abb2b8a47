# SPDX-License-Identifier: Apache-2.0
"""``xvd backend``: the daemon that serves every disk assigned to its domain."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from xvd.backend.groups import Groups
from xvd.backend.pressure import MemoryPressure
from xvd.backend.rival import no_rival, rival
from xvd.backend.server import Server
from xvd.blkif.assignment import BackendAssignment
from xvd.cli import common, completion, running
from xvd.cli.budgets import amounts_of
from xvd.cli.control import ControlServer
from xvd.cli.isolation import (
    Isolation,
    IsolationOption,
    Served,
    isolation_of,
    obey,
    states_of,
    supervise,
)
from xvd.cli.machines import open_machine
from xvd.cli.methods import control_methods
from xvd.cli.relay import follow_clients
from xvd.cli.storage import Layers
from xvd.cli.succession import Succession, predecessor
from xvd.cli.wanted import CommandLine, Reloading, Wanted
from xvd.engines.interface import Engine
from xvd.engines.uri import named_files, open_assigned, storage_uri
from xvd.errors import ConfigError, PeerClosed
from xvd.files import give, own_directory
from xvd.machine.interface import Machine
from xvd.machine.xen.here import XEN_DIRECTORY, available
from xvd.machine.xen.machine import XenMachine
from xvd.service.configuration import DEFAULT_PATH, KINDS
from xvd.service.sandbox.confine import check, prepare
from xvd.service.sandbox.equipment import take
from xvd.service.template import Template
from xvd.toolstack.vbd import has_device_model
from xvd.types import Domid
from xvd.xenbus.runner import in_own_thread, measure_waiting

SETTLE_S: Final = 2.0
"""Before a new worker is asked for anything: it would not know its disks."""

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
    what was changed by that is forgotten, and a file that is not in order changes nothing. Where
    another version of this program is installed by then, SIGHUP lets a process of that go on.
    """
    line = CommandLine(config, isolation or "", kind, copy, setting, group, layer, verbose)
    wanted = line.wanted()
    common.start_logging(wanted.verbose)
    served = Served(
        host, None if domid is None else Domid(domid), line, wanted, Groups(wanted.groups)
    )
    return _serve(served)


def _serve(served: Served) -> int:
    """Serve in one process, or in one for each guest."""
    wanted, host = served.wanted, served.host
    isolation = isolation_of(wanted, real=host is None and available())
    before = predecessor()
    if isolation is Isolation.SHARED:
        return running.run(_backend(served, before))
    served = served.alone(isolation)
    if isolation is Isolation.GUEST:
        check()
    template = Template(partial(_work, served), partial(_prepare, isolation, before))
    return running.run(supervise(served, template, before, kinds=_kinds))


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


def _prepare(isolation: Isolation, before: socket.socket | None) -> None:
    """Find out once what every worker would, and keep from them what is the supervisor's."""
    if before is not None:
        before.close()
    measure_waiting()
    if isolation is Isolation.GUEST:
        prepare()


def _work(served: Served, order: dict[str, Any], channel: socket.socket) -> int:
    """Serve one guest, in a process of its own, and reach no more than that takes."""
    given, machine = take(channel)
    return running.run(_serve_guest(served, order, channel, machine, confined=given.confined))


async def _serve_guest(
    served: Served,
    order: dict[str, Any],
    channel: socket.socket,
    machine: Machine,
    *,
    confined: bool,
) -> int:
    """Serve the disks of a guest's domains until a signal comes."""
    stop = running.Stop()
    pulse = asyncio.Event()  # set as the supervisor asks: a process that is idle wakes up once
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(machine.close)
        # Who else serves these kinds the supervisor has seen; a worker could not look.
        server = await _server(
            served, machine, stack, kinds=order["kinds"], guests=order["domains"],
            directory=served.host or XEN_DIRECTORY, relieved=stop.asked if confined else None,
            pulse=pulse,
        )  # fmt: skip
        obey(server, order)
        control = ControlServer(control_methods(server))
        await server.start()
        stack.push_async_callback(server.close)
        await server.settle(SETTLE_S)
        stack.callback(
            follow_clients(
                channel, lambda sock, reading: control.adopt(sock, reading=reading), pulse.set
            )
        )
        if not await stop.wait_or(server.wait()):
            raise PeerClosed("the host's xenstore is gone")
    return 0


async def _backend(served: Served, before: socket.socket | None) -> int:
    """Serve every guest until a signal comes."""
    wanted = served.wanted
    stop = running.Stop()
    succession = Succession(stop, before)
    machine, directory = await open_machine(served.host, served.domid)
    os.close(own_directory(directory.resolve(), mode=0o770))  # what is kept there is believed
    name = f"backend-{machine.domid}"
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(machine.close)
        real = isinstance(machine, XenMachine)
        kinds = _kinds(wanted.kinds, real)
        _take_back(states_of(wanted, directory, name))
        server = await _server(
            served, machine, stack, kinds=kinds, guests=None, directory=directory,
            rival=rival if real else no_rival,
        )  # fmt: skip
        if not await succession.follow():
            return 0
        stack.callback(succession.let_go)
        control = ControlServer(control_methods(server))
        await control.listen(directory / "control" / name)
        stack.push_async_callback(control.close)
        await server.start()
        stack.push_async_callback(server.close)
        stop.on_hangup(Reloading(served.line, wanted, partial(_replace, server), succession))
        await stack.enter_async_context(running.watched())
        succession.tell_ready(kinds)
        if not await stop.wait_or(server.wait()):
            raise PeerClosed(f"{directory}: the host's xenstore is gone; start it, then this again")
        succession.tell_end()
    return 0


async def _server(
    served: Served,
    machine: Machine,
    stack: contextlib.AsyncExitStack,
    *,
    kinds: list[str],
    guests: list[int] | None,
    directory: Path,
    rival: Callable[[str], str] = no_rival,
    relieved: asyncio.Event | None = None,
    pulse: asyncio.Event | None = None,
) -> Server:
    """Make what serves disks, with what has to end after it on the stack. relieved: of a confined
    process: is set when another takes its place. pulse: see `Server`."""
    wanted = served.wanted
    store = await machine.xenstore()
    stack.push_async_callback(store.close)

    async def storage(assignment: BackendAssignment) -> Engine:
        if relieved is not None and named_files(storage_uri(assignment)) is None:
            await relieved.wait()  # another process, that may open it, takes over at once
            raise asyncio.CancelledError
        device_model = await has_device_model(store, assignment.frontend_domid)
        opening = partial(
            open_assigned, assignment, layers=wanted.layers, device_model=device_model
        )
        return await in_own_thread(opening)

    states = states_of(wanted, directory, f"backend-{machine.domid}")
    server = Server(
        machine, store, storage, kinds=kinds, guests=guests,
        settings=replace(wanted.settings, state_dir=states), overrides=wanted.overrides,
        budget=wanted.lower(amounts_of(machine)), groups=served.groups, rival=rival,
        pulse=pulse,
    )  # fmt: skip
    stack.callback(MemoryPressure(server.squeeze).close)
    return server


def _take_back(states: Path) -> None:
    """Own the directories of guests that processes of their own have served before."""
    if os.geteuid() == 0 and states.is_dir():
        for path in states.iterdir():
            if path.name.isdigit():
                os.close(give(path, 0))


async def _replace(server: Server, wanted: Wanted) -> None:
    """Let what is wanted now hold for every disk."""
    server.replace(wanted.texts, wanted.overrides, wanted.groups)
