# SPDX-License-Identifier: Apache-2.0
"""``xvd backend --isolation guest``: a process for each guest, and the one that keeps them."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from xvd.backend.groups import Groups, NoGroups
from xvd.backend.server import Server, settings_apart
from xvd.backend.settings import Settings
from xvd.backend.xentop import DIRECTORY as XENTOP
from xvd.cli import running
from xvd.cli.control import ControlServer
from xvd.cli.daemons import ask_one
from xvd.cli.machines import open_machine
from xvd.cli.rights import GuestRights
from xvd.cli.succession import Succession
from xvd.cli.wanted import CommandLine, Reloading, Wanted
from xvd.errors import ConfigError, PeerClosed
from xvd.files import own_directory
from xvd.machine.xen.machine import XenMachine
from xvd.service.sandbox.confine import check
from xvd.service.sandbox.equipment import Place
from xvd.service.supervisor import Supervisor
from xvd.service.template import Template
from xvd.sockets import remove_dead
from xvd.types import Domid

logger = logging.getLogger(__name__)

HURRY_S: Final = 1.0
"""How long a worker may take to end when the workers of a successor wait for all of them."""


class Isolation(StrEnum):
    """Which guests one process serves, and what it may reach."""

    SHARED = "shared"
    PROCESS = "process"
    GUEST = "guest"


IsolationOption = Annotated[
    Isolation | None,
    typer.Option(
        "--isolation",
        help="shared: one process serves every guest. guest: each guest has a process of its own, "
        "whose end costs that guest a delay and the others nothing, and which can reach nothing "
        "but its guest's disks. process: the same, without that fence. Default: guest on real Xen "
        "where no limits are shared (--group), else shared. See docs/security.md.",
    ),
]


@dataclass(frozen=True, slots=True)
class Served:
    """What a backend serves and how, as its options and its file say."""

    host: Path | None
    domid: Domid | None
    line: CommandLine
    wanted: Wanted
    groups: Groups

    def alone(self, isolation: Isolation) -> "Served":
        """Return it for processes of one guest. Raises `ConfigError` where guests share limits."""
        check_alone(self.wanted)
        wanted = replace(self.wanted, isolation=isolation)
        return replace(self, wanted=wanted, groups=NoGroups())


def isolation_of(wanted: Wanted, *, real: bool) -> Isolation:
    """Return what is wanted, and where nobody has said what, the best that goes with the rest."""
    if wanted.isolation != "auto":
        return Isolation(wanted.isolation)
    if not real or _shared_limits(wanted):
        return Isolation.SHARED
    try:
        check()
    except ConfigError as error:
        logger.warning("guests' processes are not confined: %s", error)
        return Isolation.PROCESS
    return Isolation.GUEST


def check_alone(wanted: Wanted) -> None:
    """Raise `ConfigError` where disks of several guests are to share limits."""
    for name in _shared_limits(wanted):
        NoGroups().check(name)


def _shared_limits(wanted: Wanted) -> list[str]:
    """Return the groups that are named."""
    settings = wanted.settings
    apart = [settings.changed(Settings.parse(each)) for each in wanted.overrides.values()]
    named = (*wanted.groups, *(each.group_name for each in (settings, *apart)))
    return [name for name in named if name]


class Told:
    """What workers are told beside what they were forked with: what the file says that was read
    again, and what was set since, the last text of each setting."""

    def __init__(self, wanted: Wanted, kinds: Sequence[str]) -> None:
        self._wanted = wanted
        self.kinds = list(kinds)
        self._replaced: tuple[list[str], dict[str, list[str]]] | None = None
        self._texts: dict[str, dict[str, str]] = {"": {}}

    def replace(self, wanted: Wanted) -> None:
        """Let this hold, and nothing that was set before."""
        self._wanted, self._replaced = wanted, (wanted.texts, wanted.overrides)
        self._texts = {"": {}}

    def change(self, texts: Sequence[str], disk: str = "") -> dict[str, Any]:
        """Set each ``NAME=VALUE``, as `Server.change`; what holds then.

        Raises `ConfigError`, and then nothing is changed: no worker is told what it would refuse.
        """
        NoGroups().check(str(Settings.parse(texts).get("group_name") or ""))
        named = dict(zip((text.partition("=")[0].strip() for text in texts), texts, strict=True))
        changed = self._texts | {disk: self._texts.get(disk, {}) | named}
        overrides = self._wanted.overrides
        for_all = self._wanted.settings.changed(Settings.parse(list(changed[""].values())))
        apart = settings_apart(
            for_all,
            {
                one: Settings.parse([*overrides.get(one, ()), *changed.get(one, {}).values()])
                for one in {*overrides, *changed} - {""}
            },
        )
        self._texts = changed
        return apart.get(disk, for_all).values()

    def order(self, domains: Sequence[int]) -> dict[str, Any]:
        """Make the order of a worker; `obey` is the other side."""
        changes = [(list(texts.values()), disk) for disk, texts in self._texts.items() if texts]
        return {
            "domains": list(domains), "kinds": self.kinds, "replaced": self._replaced,
            "changes": changes,
        }  # fmt: skip


def obey(server: Server, order: dict[str, Any]) -> None:
    """Let hold what a worker was told when it was forked."""
    if order["replaced"] is not None:
        texts, overrides = order["replaced"]
        server.replace(texts, overrides, {})
    for texts, disk in order["changes"]:
        server.change(texts, disk)


async def supervise(
    served: Served,
    template: Template,
    before: socket.socket | None,
    *,
    kinds: Callable[[list[str], bool], list[str]],
) -> int:
    """Have a worker for each guest, until a signal comes. before: see `Succession`. kinds: chooses
    those to serve."""
    stop = running.Stop()
    succession = Succession(stop, before)
    machine, directory = await open_machine(served.host, served.domid)
    os.close(own_directory(directory.resolve(), mode=0o770))  # what is kept there is believed
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(template.close)
        stack.callback(machine.close)
        chosen = kinds(served.wanted.kinds, isinstance(machine, XenMachine))
        store = await machine.xenstore()
        stack.push_async_callback(store.close)
        name = f"backend-{machine.domid}"
        told, own = Told(served.wanted, chosen), directory / "control" / name
        states = states_of(served.wanted, directory, name)
        os.close(own_directory(states))
        place = Place(machine, directory, states, chosen, XENTOP)
        rights = GuestRights(served.wanted, store, place, own)
        supervisor = Supervisor(
            store, template, chosen, told.order, clear=partial(_clear, own), rights=rights
        )
        rights.supervisor = supervisor
        if not await succession.follow():
            return 0
        stack.callback(succession.let_go)
        control = ControlServer(_supervisor_methods(served, supervisor, told, rights))
        await control.listen(own)
        stack.push_async_callback(control.close)
        stack.push_async_callback(rights.close)
        await supervisor.start()
        stack.push_async_callback(_close, supervisor, succession)
        replace_all = partial(_replace, own, told)
        stop.on_hangup(Reloading(served.line, served.wanted, replace_all, succession))
        await stack.enter_async_context(running.watched())
        succession.tell_ready(chosen)
        lost = asyncio.ensure_future(supervisor.wait())
        if not await stop.wait_or(lost):
            raise PeerClosed(f"{directory}: {await lost}")
        succession.tell_end()
    return 0


async def _close(supervisor: Supervisor, succession: Succession) -> None:
    """End every worker; where others are to follow, no guest waits long for another's storage."""
    await supervisor.close(HURRY_S if succession.has_successor else None)


def states_of(wanted: Wanted, directory: Path, name: str) -> Path:
    """Return where a daemon keeps what outlives it."""
    return Path(wanted.state_directory or directory / "state") / name


def _clear(own: Path, known: Collection[int]) -> None:
    """Remove the sockets that killed workers have left, but for these domains'."""
    kept = {own.with_name(f"{own.name}-{domain}") for domain in known}
    remove_dead({*own.parent.glob(f"{own.name}-*")} - kept)


async def _replace(own: Path, told: Told, wanted: Wanted) -> None:
    """Let what is wanted now hold for every worker, and for later ones. own: our socket."""
    check_alone(wanted)
    told.replace(wanted)
    workers = own.parent.glob(f"{own.name}-*")
    params = {"texts": wanted.texts, "overrides": wanted.overrides}
    await asyncio.gather(*(ask_one(path, "replace", **params) for path in workers))


def _supervisor_methods(
    served: Served, supervisor: Supervisor, told: Told, rights: GuestRights
) -> dict[str, Callable[..., object]]:
    """Its answers: it has no disk, and tells later workers what was set."""

    def group(name: str, texts: list[str]) -> dict[str, Any]:
        served.groups.change(name, texts)
        return {}

    return {
        "kinds": lambda: told.kinds,
        "stats": lambda: [],
        "set": told.change,
        "group": group,
        "workers": lambda: [
            worker | {"confined": rights.is_confined(worker["guest"])}
            for worker in supervisor.workers()
        ],
    }
