# SPDX-License-Identifier: Apache-2.0
"""What a shell offers behind a verb: guests and disks that are there, settings, and layers.

A shell waits for this: whatever goes wrong, or takes long, is an empty list. Every verb imports it,
so what is offered is imported when it is asked for.
"""

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Final

import typer

from xvd.blkif.vdev import format_vdev
from xvd.errors import XvdError
from xvd.types import DOM0

if TYPE_CHECKING:
    from xvd.toolstack.vbd import Listed

PATIENCE_S: Final = 2.0
"""For a host to answer."""

Offer = tuple[str, str]
"""What may stand there, and what it is."""


def _host(ctx: typer.Context) -> str | None:
    """The host that the verb would take."""
    default = next((it.default for it in ctx.command.params if it.name == "host"), None)
    given = ctx.params.get("host") or os.environ.get("XVD_HOST") or default
    return None if given is None else str(given)


async def _ask(host: str | None) -> "list[Listed]":
    from xvd import joining
    from xvd.toolstack.vbd import list_disks

    async with asyncio.timeout(PATIENCE_S):
        machine, _ = await joining.open_machine(host, DOM0)
        try:
            async with await machine.xenstore() as store:
                return await list_disks(store)
        finally:
            machine.close()


def _disks(ctx: typer.Context) -> "list[Listed]":
    try:
        return asyncio.run(_ask(_host(ctx)))
    except (OSError, XvdError):
        return []


def _beginning(offers: Iterable[Offer], incomplete: str) -> list[Offer]:
    return [offer for offer in dict.fromkeys(offers) if offer[0].startswith(incomplete)]


def guests(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """The numbers of the guests that have disks."""
    return _beginning(((str(it.vbd.domid), "") for it in _disks(ctx)), incomplete)


def vdevs(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """The names of a guest's disks."""
    guest = ctx.params.get("guest")
    of_guest = (it for it in _disks(ctx) if guest is None or it.vbd.domid == guest)
    return _beginning(((format_vdev(it.vbd.vdev), it.target) for it in of_guest), incomplete)


def disks(ctx: typer.Context, incomplete: str) -> list[Offer]:
    """Every disk as ``1/xvda``."""
    return _beginning(((it.vbd.name, it.target) for it in _disks(ctx)), incomplete)


def _settings(*ends: str) -> Callable[[str], list[Offer]]:
    def offered(incomplete: str) -> list[Offer]:
        tables = [import_module(f"xvd.{end}.settings").Settings.table() for end in ends]
        rows = ((name, row.meaning) for table in tables for name, row in table.items())
        return _beginning(((f"{name}=", meaning) for name, meaning in rows), incomplete)

    return offered


back_settings = _settings("backend")
front_settings = _settings("frontend")
settings_of_both = _settings("backend", "frontend")


def _layers(incomplete: str) -> Iterator[Offer]:
    from xvd.engines.uri import LAYERS

    name, colon, options = incomplete.partition(":")
    if not colon:
        for layer in LAYERS.values():
            yield f"{layer.name}:" if layer.options else layer.name, layer.help
    elif name in LAYERS:
        before = incomplete[: len(incomplete) - len(options.rpartition(",")[2])]
        for option in LAYERS[name].options:
            yield f"{before}{option}=", ""


def layers(incomplete: str) -> list[Offer]:
    """The layers, and behind one's colon its options."""
    return _beginning(_layers(incomplete), incomplete)
