# SPDX-License-Identifier: Apache-2.0
"""``xvd attach``, ``detach``, ``list``: the toolstack's verbs on an emulated host."""

import contextlib
import sys
from collections.abc import AsyncIterator
from typing import Annotated

import typer

from xvd.blkif.abi import XenbusState
from xvd.blkif.vdev import format_vdev
from xvd.cli import common
from xvd.errors import ConfigError
from xvd.machine.emulated.link import LinkClient
from xvd.machine.emulated.machine import EmulatedMachine
from xvd.machine.emulated.service import connect
from xvd.machine.xs.client import XenstoreClient
from xvd.toolstack import vbd as toolstack
from xvd.toolstack.xldisk import parse_xl_disk
from xvd.types import Domid


@contextlib.asynccontextmanager
async def _dom0(host: common.HostDir) -> AsyncIterator[tuple[EmulatedMachine, XenstoreClient]]:
    machine = connect(host, Domid(0))
    try:
        store = await machine.xenstore()
        try:
            yield machine, store
        finally:
            await store.close()
    finally:
        machine.close()


def attach(
    guest: common.Guest,
    disk: Annotated[
        str, typer.Argument(help="xl's disk syntax: 'vdev=xvda,access=rw,target=IMAGE-or-URI'.")
    ],
    host: common.HostDir = common.DEFAULT_HOST,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.0, help="Seconds to wait for a backend.")
    ] = toolstack.INIT_TIMEOUT_S,
) -> int:
    """Attach a disk to a guest of an emulated host; a guest that is not there yet is made."""
    description = parse_xl_disk(disk)

    async def main() -> int:
        async with _dom0(host) as (machine, store):
            if not await store.exists(f"/local/domain/{guest}"):
                assert isinstance(machine.calls, LinkClient)
                machine.calls.create_domain(Domid(guest))
                await toolstack.create_guest(store, Domid(guest), f"guest-{guest}")
            backend_domid = Domid(int(description.backend or 0))
            await toolstack.attach(
                store, Domid(guest), description, backend_domid=backend_domid, timeout_s=timeout
            )
        return 0

    if description.backend and not description.backend.isdigit():
        raise ConfigError(f"backend={description.backend}: give the domain's number")
    return common.run(main())


def detach(
    guest: common.Guest,
    vdev: common.Vdev,
    host: common.HostDir = common.DEFAULT_HOST,
    force: Annotated[
        bool, typer.Option("--force", help="Remove it whatever its guest says.")
    ] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.0, help="Seconds to wait for both ends to close.")
    ] = toolstack.INIT_TIMEOUT_S,
) -> int:
    """Take a disk away from a guest of an emulated host."""
    number = common.vdev_number(vdev)

    async def main() -> int:
        async with _dom0(host) as (_, store):
            rows = [
                row.vbd
                for row in await toolstack.list_disks(store)
                if (row.vbd.domid, row.vbd.vdev) == (guest, number)
            ]
            disk = rows[0] if rows else toolstack.Vbd(Domid(guest), number)
            await toolstack.detach(store, disk, force=force, timeout_s=timeout)
        return 0

    return common.run(main())


def _state(text: str) -> str:
    return XenbusState(int(text)).name.lower() if text in "012345678" else text


def list_disks(host: common.HostDir = common.DEFAULT_HOST, json: common.Json = False) -> int:
    """List the disks of an emulated host's guests, and how both ends of each stand."""

    async def main() -> int:
        async with _dom0(host) as (_, store):
            rows = [
                {
                    "guest": row.vbd.domid,
                    "vdev": format_vdev(row.vbd.vdev),
                    "backend": row.vbd.backend_domid,
                    "mode": row.mode,
                    "frontend_state": _state(row.frontend_state),
                    "backend_state": _state(row.backend_state),
                    "target": row.target,
                }
                for row in await toolstack.list_disks(store)
            ]
        if json:
            common.print_json(rows)
        else:
            _print_table(rows)
        return 0

    return common.run(main())


def _print_table(rows: list[dict[str, object]]) -> None:
    line = (
        "{guest:>5} {vdev:<8} {backend:>7} {mode:<4} "
        "{frontend_state:<12} {backend_state:<12} {target}\n"
    )
    titles = ("guest", "vdev", "backend", "mode", "frontend_state", "backend_state", "target")
    heads = dict(zip(titles, ("guest", "vdev", "backend", "mode", "frontend", "backend", "target"),
                     strict=True))  # fmt: skip
    sys.stdout.write(line.format(**heads))
    for row in rows:
        sys.stdout.write(line.format(**row))
