# SPDX-License-Identifier: Apache-2.0
"""``xvd serve``: a whole emulated host in one process, from an image to an NBD export."""

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from xvd import embed
from xvd.backend.settings import Settings
from xvd.cli import common, output, running
from xvd.cli.control import ControlServer
from xvd.cli.report import account, disk_figures
from xvd.engines.interface import Engine
from xvd.engines.text import in_format
from xvd.engines.uri import open_engine
from xvd.errors import ConfigError
from xvd.export.nbd import NbdServer
from xvd.frontend.settings import Settings as FrontSettings
from xvd.toolstack.xldisk import XlDisk


@dataclass(frozen=True, slots=True)
class _Job:
    """What is to be served and how."""

    disk: XlDisk
    engine: Engine
    directory: Path
    command: str
    socket: Path
    tcp: tuple[str, int] | None
    settings: Settings
    front: FrontSettings
    report: bool


def serve(
    image: common.Image,
    run: Annotated[
        str, typer.Option("--run", help="Shell command to run with $uri set; its status is ours.")
    ] = "",
    read_only: Annotated[bool, typer.Option("-r", "--read-only", help="Refuse writes.")] = False,
    image_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="What the image is: qcow2, vhdx and so on; raw: serve the bytes as they lie, also "
            "if they look like another format.",
        ),
    ] = "",
    socket: Annotated[
        Path | None,
        typer.Option("--socket", help="Path of the NBD socket (default: a private one)."),
    ] = None,
    tcp: common.Tcp = "",
    allow_remote: common.Remote = False,
    vdev: Annotated[str, typer.Option("--vdev", help="The disk's name in the guest.")] = "xvda",
    copy: Annotated[bool, typer.Option("--copy", help="Grant copy instead of mapping.")] = False,
    setting: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="[END:]NAME=VALUE",
            help="A setting of both ends under the name of Linux's parameter: max_queues=4; "
            "back:max_persistent_grants=0 or front:page_size=65536 sets that of one end. May be "
            "given several times.",
        ),
    ] = [],  # noqa: B006  typer needs a literal
    layer: common.Layers = [],  # noqa: B006  typer needs a literal
    report: Annotated[
        bool, typer.Option("--report", help="Print an account of what happened at the end.")
    ] = False,
    verbose: common.Verbose = 0,
) -> int:
    """Serve IMAGE through a Xen ring on an emulated host, and offer the disk as an NBD export.

    Without --run it prints the export's URI, with --tcp that one too, and serves until SIGINT or
    SIGTERM.
    """
    common.start_logging(verbose)
    image = in_format(image, image_format) if image_format else image
    common.vdev_number(vdev)
    disk = XlDisk(target=image, vdev=vdev, writable=not read_only)
    address = common.parse_tcp(tcp, allow_remote=allow_remote)
    back, front = split_ends(setting)
    settings = Settings(copying=copy).changed(Settings.parse(back))
    front_settings = FrontSettings.of(front)
    engine = open_engine(image, read_only=read_only, layers=layer, user=f"{embed.GUEST}/{vdev}")
    with contextlib.ExitStack() as stack:
        stack.callback(engine.close)
        directory = stack.enter_context(running.private_directory())
        where = socket or directory / "nbd.sock"
        job = _Job(disk, engine, directory, run, where, address, settings, front_settings, report)
        return running.run(_serve(job))


def split_ends(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """(settings of the backend, settings of the frontend); `ConfigError` for one of neither.

    Without an end it is of each that has a setting of that name.
    """
    ends: dict[str, tuple[Mapping[str, object], list[str]]] = {
        "back": (Settings.table(), []),
        "front": (FrontSettings.table(), []),
    }
    for text in settings:
        end, colon, plain = text.rpartition(":")
        name = plain.partition("=")[0].strip()
        if colon and end not in ends:
            raise ConfigError(f"{text!r}: there are the ends {' and '.join(ends)}, and no {end!r}")
        of = [end] if colon else [one for one, (names, _) in ends.items() if name in names]
        if not of:
            known = ", ".join(sorted({*Settings.table(), *FrontSettings.table()}))
            raise ConfigError(f"{text!r} sets nothing; write NAME=VALUE with one of {known}")
        for one in of:
            ends[one][1].append(plain)
    return ends["back"][1], ends["front"][1]


async def _serve(job: _Job) -> int:
    stop = running.Stop()
    async with (
        embed.hosted(
            [(job.engine, job.disk)], settings=job.settings, front=job.front,
            budget=common.emulated_budget(),
        ) as [(opened, device)],
        contextlib.AsyncExitStack() as stack,
    ):  # fmt: skip
        holes = job.engine.info.tells_holes
        export = NbdServer(opened, storage=job.engine, tells_holes=holes)
        stack.push_async_callback(export.close)
        await export.listen_unix(job.socket)
        if job.tcp is not None:
            await export.listen_tcp(*job.tcp)
        control = ControlServer({"stats": lambda: [disk_figures(device, opened)]})
        await control.listen(job.directory / "control" / "serve")
        stack.push_async_callback(control.close)
        begun = time.monotonic()
        status = await _use(job, stop, export)
        await export.close()
        if job.report:
            sys.stderr.write(account(disk_figures(device, opened), time.monotonic() - begun))
    return status


async def _use(job: _Job, stop: running.Stop, export: NbdServer) -> int:
    if job.command:
        return await running.run_captive(
            job.command, stop, **running.variables(export.uris, job.socket)
        )
    output.tell("".join(f"{uri}\n" for uri in export.uris))
    await stop.wait()
    return 0
