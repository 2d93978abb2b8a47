# SPDX-License-Identifier: Apache-2.0
"""``xvd attach``, ``detach``, ``list``: the toolstack's verbs on an emulated host."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from xvd.blkif.abi import XenbusState
from xvd.blkif.vdev import format_vdev, vdev_number
from xvd.cli import common, output, running
from xvd.cli.daemons import Answer, ask_one, complain
from xvd.errors import ConfigError, PeerClosed
from xvd.machine.emulated.paths import MACHINE_SOCKET, XENSTORE_SOCKET
from xvd.machine.xs.client import XenstoreClient
from xvd.toolstack import vbd as toolstack
from xvd.types import DOM0, Domid


async def _store(host: Path) -> XenstoreClient:
    """Connect to the host's store as its domain 0."""
    try:
        return await XenstoreClient.connect(host / XENSTORE_SOCKET)
    except PeerClosed as error:
        raise PeerClosed(f"{error}; start a host: xvd host {host}") from None


def _create_domain(host: Path, domid: Domid) -> None:
    """Make a domain on the host's machine."""
    from xvd.machine.emulated.link import LinkClient

    link = LinkClient(host / MACHINE_SOCKET, DOM0)
    try:
        link.create_domain(domid)
    finally:
        link.close()


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
    from xvd.toolstack.xldisk import parse_xl_disk

    description = parse_xl_disk(disk)
    description.target = common.absolute(description.target)

    async def main() -> int:
        async with await _store(host) as store:
            if not await store.exists(f"/local/domain/{guest}"):
                _create_domain(host, Domid(guest))
                await toolstack.create_guest(store, Domid(guest), f"guest-{guest}")
            backend_domid = Domid(int(description.backend or 0))
            await toolstack.attach(
                store, Domid(guest), description, backend_domid=backend_domid, timeout_s=timeout
            )
        return 0

    if description.backend and not description.backend.isdigit():
        raise ConfigError(f"backend={description.backend}: give the domain's number")
    return running.run(main())


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
    number = vdev_number(vdev)

    async def main() -> int:
        async with await _store(host) as store:
            rows = [
                row.vbd
                for row in await toolstack.list_disks(store)
                if (row.vbd.domid, row.vbd.vdev) == (guest, number)
            ]
            disk = rows[0] if rows else toolstack.Vbd(Domid(guest), number)
            await toolstack.detach(store, disk, force=force, timeout_s=timeout)
        return 0

    return running.run(main())


def _state(text: str) -> str:
    return XenbusState(int(text)).name.lower() if text in "012345678" else text


_ROW: Final = "{:<9} {:>7} {:<4} {:<12} {:<12} {:<6} {}\n"
_HEADS: Final = ("disk", "backend", "mode", "frontend", "backend", "daemon", "target")
_NO_DAEMON: Final = "-"


def list_disks(host: common.HostDir = common.DEFAULT_HOST, json: common.Json = False) -> int:
    """List the disks of an emulated host's guests, and how both ends of each stand.

    The states are what both ends have written; whether the backend's daemon lives is asked of it,
    and whether it has paused the disk or given it another target.
    Fails if one does not live: its disks are not served, whatever is written.
    """
    return running.run(_list(host, json))


async def _list(host: Path, json: bool) -> int:
    async with await _store(host) as store:
        listed = await toolstack.list_disks(store)
    domids = sorted({row.vbd.backend_domid for row in listed})
    names = [name for domid in domids for name in (f"backend-{domid}", f"backend-{domid}-*")]
    paths = [path for name in names for path in sorted((host / "control").glob(name))]
    asked = [ask_one(path, "stats") for path in paths if path.is_socket()]
    answers = {answer.daemon: answer for answer in await asyncio.gather(*asked)}
    rows = [_row(row, _daemon_of(row, answers)) for row in listed]
    if json:
        output.print_json(rows)
    else:
        fields = ("disk", "backend", "mode", "frontend_state", "backend_state", "daemon", "target")
        lines = [_ROW.format(*_HEADS)]
        lines += [_ROW.format(*(row[field] for field in fields)) for row in rows]
        output.tell("".join(lines))
    return complain(answers.values())


def _daemon_of(row: toolstack.Listed, answers: Mapping[str, Answer]) -> Answer | None:
    """Name who serves a disk: its guest's own process, where there is one."""
    name = f"backend-{row.vbd.backend_domid}"
    own = (it for it in answers.values() if f"{it.daemon}-".startswith(f"{name}-"))
    serving = (it for it in own if _told(row, it))
    return next(serving, answers.get(f"{name}-{row.vbd.domid}", answers.get(name)))


def _told(row: toolstack.Listed, answer: Answer | None) -> list[dict[str, Any]]:
    """Return what a daemon tells of a disk."""
    path = f"/{row.vbd.domid}/{row.vbd.vdev}"
    return [of for of in (answer.result or () if answer else ()) if of["path"].endswith(path)]


def _row(row: toolstack.Listed, answer: Answer | None) -> dict[str, object]:
    told = _told(row, answer)
    known = told[0] if told else {"paused": False, "held": "", "swapped_to": ""}
    halted = "paused" if known["paused"] else "held" if known["held"] else ""
    return {
        "disk": row.vbd.name,
        "guest": row.vbd.domid,
        "vdev": format_vdev(row.vbd.vdev),
        "backend": row.vbd.backend_domid,
        "mode": row.mode,
        "frontend_state": _state(row.frontend_state),
        "backend_state": halted or _state(row.backend_state),
        "daemon": answer.state if answer else _NO_DAEMON,
        "target": known["swapped_to"] or row.target,
    }
