# SPDX-License-Identifier: Apache-2.0
"""``xvd serve``: a whole emulated host in one process, from an image to an NBD export."""

import contextlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from xvd import embed
from xvd.backend.settings import Settings
from xvd.blkif.vdev import vdev_number
from xvd.cli import common, completion, running, serving
from xvd.cli.budgets import emulated_budget
from xvd.cli.control import ControlServer
from xvd.cli.report import account, disk_figures
from xvd.cli.serving import Places
from xvd.cli.storage import Images, Layers
from xvd.engines.interface import Engine
from xvd.engines.text import in_format
from xvd.engines.uri import named_files, open_engine, split_layers
from xvd.errors import ConfigError
from xvd.export.nbd import NbdServer
from xvd.frontend.settings import Settings as FrontSettings
from xvd.toolstack.xldisk import XlDisk

EndSettings = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="[END:]NAME=VALUE",
        autocompletion=completion.settings_of_both,
        help="A setting of both ends under the name of Linux's parameter: max_queues=4; "
        "back:max_persistent_grants=0 or front:page_size=65536 sets that of one end. May be "
        "given several times.",
    ),
]


@dataclass(frozen=True, slots=True)
class _Job:
    """What is to be served and how: each disk with its storage and its export's name."""

    disks: Sequence[tuple[Engine, XlDisk]]
    names: Sequence[str]
    directory: Path
    places: Places
    settings: Settings
    front: FrontSettings
    report: bool


def serve(
    image: Images,
    run: serving.Run = "",
    read_only: Annotated[bool, typer.Option("-r", "--read-only", help="Refuse writes.")] = False,
    image_format: serving.Format = "",
    export_name: serving.ExportNames = [],  # noqa: B006  typer needs a literal
    socket: serving.Socket = None,
    tcp: common.Tcp = "",
    allow_remote: common.Remote = False,
    tls_creds: serving.TlsCreds = None,
    tls_verify_peer: serving.VerifyPeer = False,
    pidfile: serving.PidFile = None,
    exit_with_parent: serving.ExitWithParent = False,
    vdev: Annotated[
        str, typer.Option("--vdev", help="The disk's name in the guest (default: xvda).")
    ] = "",
    copy: Annotated[bool, typer.Option("--copy", help="Grant copy instead of mapping.")] = False,
    setting: EndSettings = [],  # noqa: B006  typer needs a literal
    layer: Layers = [],  # noqa: B006  typer needs a literal
    report: Annotated[
        bool, typer.Option("--report", help="Print an account of what happened at the end.")
    ] = False,
    verbose: common.Verbose = 0,
) -> int:
    """Serve each IMAGE through a Xen ring on an emulated host, and offer the disks as NBD exports.

    Without --run it prints every export's URI, with --tcp those too, and serves until SIGINT or
    SIGTERM.
    """
    common.start_logging(verbose)
    if exit_with_parent:
        running.end_with_parent()
    images = [in_format(it, image_format) if image_format else it for it in image]
    if not read_only:
        check_once(images)
    names, vdevs = serving.name_exports(image, export_name), serving.vdevs(len(images), vdev)
    vdev_number(vdevs[0])
    back, front = split_ends(setting)
    settings = Settings(copying=copy).changed(Settings.parse(back))
    front_settings = FrontSettings.of(front)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(running.private_directory())
        places = serving.places(
            directory, socket=socket, tcp=tcp, allow_remote=allow_remote, tls_creds=tls_creds,
            verify_peer=tls_verify_peer, pidfile=pidfile, command=run,
        )  # fmt: skip
        disks = []
        for uri, name in zip(images, vdevs, strict=True):
            user = f"{embed.GUEST}/{name}"
            engine = open_engine(uri, read_only=read_only, layers=layer, user=user)
            stack.callback(engine.close)
            disks.append((engine, XlDisk(target=uri, vdev=name, writable=not read_only)))
        return running.run(
            _serve(_Job(disks, names, directory, places, settings, front_settings, report))
        )


def check_once(images: Sequence[str]) -> None:
    """Raise `ConfigError` for an image that two disks would write to."""
    seen: set[str] = set()
    for image in images:
        layers, uri = split_layers(image)
        files = [os.path.realpath(path) for path in named_files(uri) or ()]
        if layers or len(files) != 1:
            continue
        if files[0] in seen:
            raise ConfigError(
                f"{image} is named twice, and one disk at a time may write to it; name it once, as "
                "any number of clients may share a disk, or serve all of them read-only: -r"
            )
        seen.add(files[0])


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
            job.disks, settings=job.settings, front=job.front, budget=emulated_budget()
        ) as both,
        contextlib.AsyncExitStack() as stack,
    ):
        exports = _exports(job, both)
        stack.push_async_callback(exports.close)
        await job.places.listen(exports)

        def figures() -> list[dict[str, object]]:
            return [disk_figures(device, disk) for disk, device in both]

        control = ControlServer({"stats": figures})
        await control.listen(job.directory / "control" / "serve")
        stack.push_async_callback(control.close)
        begun = time.monotonic()
        with job.places.told():
            status = await job.places.use(exports, stop)
            if status is None:
                await stop.wait()
        await exports.close()
        for each in figures() if job.report else []:
            sys.stderr.write(account(each, time.monotonic() - begun))
    return status or 0


def _exports(job: _Job, both: Sequence[embed.Served]) -> NbdServer:
    """The server of every disk, the first of which answers to the empty name too."""
    exports: NbdServer | None = None
    for served, (engine, _), name in zip(both, job.disks, job.names, strict=True):
        holes = engine.info.tells_holes
        if exports is None:
            exports = NbdServer(served.disk, name=name, storage=engine, tells_holes=holes)
        else:
            exports.add(served.disk, name=name, storage=engine, tells_holes=holes)
    assert exports is not None
    return exports
