# SPDX-License-Identifier: Apache-2.0
"""``xvd backend --isolation guest``: a process for each guest, and the one that keeps them."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from xvd.backend.groups import Groups, NoGroups
from xvd.backend.server import Server
from xvd.backend.settings import Settings
from xvd.cli import output, running
from xvd.cli.control import ControlServer
from xvd.cli.machines import open_machine
from xvd.errors import PeerClosed
from xvd.files import own_directory
from xvd.machine.xen.machine import XenMachine
from xvd.service.supervisor import Supervisor
from xvd.service.template import ORDER_MAX, Template
from xvd.sockets import remove_dead
from xvd.types import Domid


class Isolation(StrEnum):
    """Which guests one process serves."""

    SHARED = "shared"
    GUEST = "guest"


IsolationOption = Annotated[
    Isolation,
    typer.Option(
        "--isolation",
        help="shared: one process serves every guest. guest: each guest has a process of its own, "
        "whose end costs that guest a delay and the others nothing.",
    ),
]


@dataclass(frozen=True, slots=True)
class Served:
    """What a backend serves and how, as its options say."""

    host: Path | None
    domid: Domid | None
    kinds: list[str]
    settings: Settings
    overrides: dict[str, list[str]]
    groups: Groups
    layers: list[str]

    def alone(self) -> "Served":
        """Return it for a process of one guest. Raises `ConfigError` where guests share limits."""
        found = replace(self, groups=NoGroups())
        apart = [self.settings.changed(Settings.parse(each)) for each in self.overrides.values()]
        names = (*self.groups.limits(), *(each.group_name for each in (self.settings, *apart)))
        for name in names:
            found.groups.check(name)
        return found


async def supervise(
    served: Served, template: Template, *, kinds: Callable[[list[str], bool], list[str]]
) -> int:
    """Have a worker for each guest, until a signal comes. kinds: chooses those to serve."""
    stop = running.Stop()
    machine, directory = await open_machine(served.host, served.domid)
    os.close(own_directory(directory.resolve(), mode=0o770))  # what is kept there is believed
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(template.close)
        stack.callback(machine.close)
        chosen = kinds(served.kinds, isinstance(machine, XenMachine))
        store = await machine.xenstore()
        stack.push_async_callback(store.close)
        changes = Changes(served)
        sockets, name = directory / "control", f"backend-{machine.domid}"
        supervisor = Supervisor(
            store, template, chosen,
            lambda domains: {"domains": list(domains), "changes": changes.in_order()},
            lambda known: remove_dead(
                {*sockets.glob(f"{name}-*")} - {sockets / f"{name}-{domain}" for domain in known}
            ),
        )  # fmt: skip
        control = ControlServer(_supervisor_methods(served, supervisor, changes))
        await control.listen(sockets / name)
        stack.push_async_callback(control.close)
        await supervisor.start()
        stack.push_async_callback(supervisor.close)
        output.tell("ready\n")
        running.tell_service_manager(f"READY=1\nSTATUS=serving {', '.join(chosen)}")
        lost = asyncio.ensure_future(supervisor.wait())
        if not await stop.wait_or(lost):
            raise PeerClosed(f"{directory}: {await lost}")
        running.tell_service_manager("STOPPING=1")
    return 0


class Changes:
    """What was set since the start, for workers that come later: the last text of each setting."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._texts: dict[str, dict[str, str]] = {"": {}}

    def change(self, texts: Sequence[str], disk: str = "") -> dict[str, Any]:
        """Set each ``NAME=VALUE``, as `Server.change`; what holds then.

        Raises `ConfigError`, and then nothing is changed: no worker is told what it would refuse.
        """
        values = Settings.parse(texts)
        self._served.groups.check(str(values.get("group_name") or ""))
        named = dict(zip((text.partition("=")[0].strip() for text in texts), texts, strict=True))
        changed = self._texts | {disk: self._texts.get(disk, {}) | named}
        for_all = self._served.settings.changed(Settings.parse(changed[""].values()))
        apart = {
            one: for_all.changed(
                Settings.parse(
                    [*self._served.overrides.get(one, ()), *changed.get(one, {}).values()]
                )
            )
            for one in {*self._served.overrides, *changed} - {""}
        }
        self._texts = changed
        return apart.get(disk, for_all).values()

    def in_order(self) -> list[tuple[list[str], str]]:
        """Return what a worker is to set, and for which disk: what is for all of them first."""
        return [(list(texts.values()), disk) for disk, texts in self._texts.items() if texts]


def _supervisor_methods(
    served: Served, supervisor: Supervisor, changes: Changes
) -> dict[str, Callable[..., object]]:
    """Its answers: it has no disk, and tells later workers what was set."""

    def group(name: str, texts: list[str]) -> dict[str, Any]:
        served.groups.change(name, texts)
        return {}

    return {
        "stats": lambda: [],
        "set": changes.change,
        "group": group,
        "workers": supervisor.workers,
    }


def follow_orders(server: Server, channel: socket.socket) -> Callable[[], None]:
    """Serve further domains of the guest, a line each; what is returned ends that."""
    loop = asyncio.get_running_loop()
    channel.setblocking(False)
    serving: set[asyncio.Task[None]] = set()

    def come() -> None:
        lines = channel.recv(ORDER_MAX).split()
        if not lines:
            loop.remove_reader(channel)
        for line in lines:
            task = loop.create_task(server.serve_guest(int(line)))
            serving.add(task)
            task.add_done_callback(serving.discard)

    loop.add_reader(channel, come)

    def end() -> None:
        loop.remove_reader(channel)

    return end
