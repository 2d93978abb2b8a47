# SPDX-License-Identifier: Apache-2.0
"""``xvd backend --isolation guest``: a process for each guest, and the one that keeps them."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from xvd.backend.groups import Groups, NoGroups
from xvd.backend.server import Server
from xvd.backend.settings import Settings
from xvd.cli import common, output, running
from xvd.cli.control import ControlServer
from xvd.errors import PeerClosed
from xvd.files import own_directory
from xvd.machine.xen.machine import XenMachine
from xvd.service.supervisor import Supervisor
from xvd.service.template import ORDER_MAX, Template
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
    machine, directory = await common.open_machine(served.host, served.domid)
    os.close(own_directory(directory.resolve(), mode=0o770))  # what is kept there is believed
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(template.close)
        stack.callback(machine.close)
        chosen = kinds(served.kinds, isinstance(machine, XenMachine))
        store = await machine.xenstore()
        stack.push_async_callback(store.close)
        changes: list[tuple[list[str], str]] = []
        supervisor = Supervisor(
            store, template, chosen,
            lambda domains: {"domains": list(domains), "changes": changes},
        )  # fmt: skip
        control = ControlServer(_supervisor_methods(served, supervisor, changes))
        await control.listen(directory / "control" / f"backend-{machine.domid}")
        stack.push_async_callback(control.close)
        await supervisor.start()
        stack.push_async_callback(supervisor.close)
        output.tell("ready\n")
        running.tell_service_manager(f"READY=1\nSTATUS=serving {', '.join(chosen)}")
        if not await stop.wait_or(supervisor.wait()):
            raise PeerClosed(f"{directory}: the host's xenstore is gone; start it, then this again")
        running.tell_service_manager("STOPPING=1")
    return 0


def _supervisor_methods(
    served: Served, supervisor: Supervisor, changes: list[tuple[list[str], str]]
) -> dict[str, Callable[..., object]]:
    """Its answers: it has no disk, and tells later workers what was set."""

    def change(texts: list[str], disk: str = "") -> dict[str, Any]:
        values = Settings.parse(texts)
        served.groups.check(str(values.get("group_name") or ""))
        changes.append((texts, disk))
        settings = served.settings
        for earlier, its_disk in changes:
            settings = settings.changed(Settings.parse(earlier)) if not its_disk else settings
        return settings.values()

    def group(name: str, texts: list[str]) -> dict[str, Any]:
        served.groups.change(name, texts)
        return {}

    return {
        "stats": lambda: [],
        "set": change,
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
