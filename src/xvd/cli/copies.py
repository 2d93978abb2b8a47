# SPDX-License-Identifier: Apache-2.0
"""``xvd mirror`` and ``xvd backup``: copies of a disk that are made while its guest uses it."""

import asyncio
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from xvd.cli import common, output, running
from xvd.cli.life import ask_server
from xvd.errors import ConfigError, XvdError

_LOOK_S: Final = 0.2
_QUIET_S: Final = 2.0
_PATIENCE_S: Final = 120.0
"""For what opens storage and waits for a disk to come to rest; a copy takes as long as it takes."""
_WORDS: Final = {"mirror": "mirrored to", "backup": "written to"}

Target = Annotated[
    str,
    typer.Argument(
        metavar="STORAGE",
        help="An image or a URI, as xvd serve takes it; an image file that is not there is made.",
    ),
]
Cancel = Annotated[bool, typer.Option("--cancel", help="Give the copy up that is being made.")]


class CopyFailed(XvdError):
    """A copy came to no good end."""


def mirror(
    guest: common.Guest,
    vdev: common.Vdev,
    storage: Target = "",
    pivot: Annotated[
        bool,
        typer.Option("--pivot", help="Let the disk move there, as soon as it is the same."),
    ] = False,
    cancel: Cancel = False,
    host: common.HostDir = common.DEFAULT_HOST,
    json: common.Json = False,
) -> int:
    """Make other storage the same as a disk's while its guest uses it, and move the disk there.

    Returns when the two are the same, and they stay so until --pivot or --cancel, also if this is
    interrupted. Without STORAGE, --pivot or --cancel it says how far a copy is. What the storage
    has held is overwritten. A backend that is started anew forgets a mirror.
    """
    return running.run(_copy(host, guest, vdev, "mirror", storage, json, pivot, cancel))


def backup(
    guest: common.Guest,
    vdev: common.Vdev,
    storage: Target = "",
    incremental: Annotated[
        str,
        typer.Option(
            "--incremental",
            metavar="NAME",
            help="Write only what has changed since the last backup with this name, into a new "
            "qcow2 image in front of that one; or everything, if there was none.",
        ),
    ] = "",
    forget: Annotated[
        str,
        typer.Option(
            "--forget", metavar="NAME", help="Note no more what has changed since that backup."
        ),
    ] = "",
    cancel: Cancel = False,
    host: common.HostDir = common.DEFAULT_HOST,
    json: common.Json = False,
) -> int:
    """Write a disk's content to other storage while its guest uses it.

    It has what the disk had at one moment, shortly before this returns: as after a loss of power.
    An interruption of this command does not end it; see --cancel.
    """
    if forget:
        if storage or incremental or cancel:
            raise ConfigError("--forget goes with nothing else")
        return running.run(_forget(host, guest, vdev, forget))
    if incremental and not storage:
        raise ConfigError("--incremental: where to? name it")
    more = {"name": incremental}
    return running.run(_copy(host, guest, vdev, "backup", storage, json, False, cancel, **more))


async def _copy(
    host: Path,
    guest: int,
    vdev: str,
    kind: str,
    storage: str,
    json: bool,
    pivot: bool,
    cancel: bool,
    **more: object,
) -> int:
    if cancel and (storage or pivot):
        raise ConfigError("--cancel goes with nothing else")
    if storage:
        image = common.absolute(storage)
        await ask_server(host, guest, vdev, kind, _PATIENCE_S, image=image, **more)
        await _follow(host, guest, vdev, json)
    if pivot or cancel:
        await ask_server(host, guest, vdev, "pivot" if pivot else "cancel_copy", _PATIENCE_S)
    figures = await ask_server(host, guest, vdev, "copy", _PATIENCE_S)
    if json:
        output.print_json(figures, indent=0)
    else:
        output.tell(f"{_line(figures)}\n" if figures else "no copy has been made\n")
    return 0


async def _forget(host: Path, guest: int, vdev: str, name: str) -> int:
    await ask_server(host, guest, vdev, "forget_backup", _PATIENCE_S, name=name)
    return 0


async def _follow(host: Path, guest: int, vdev: str, json: bool) -> None:
    """Wait until a mirror is ready, or a backup whole. Raises `CopyFailed`."""
    with _progress(json) as show:
        while True:
            figures = await ask_server(host, guest, vdev, "copy", _PATIENCE_S)
            if figures["phase"] in ("failed", "cancelled"):
                why = figures["why"] or "it was given up"
                raise CopyFailed(f"{guest}/{vdev}: the copy has failed: {why}")
            if figures["phase"] == ("ready" if figures["kind"] == "mirror" else "done"):
                return
            show(figures)
            await asyncio.sleep(_LOOK_S)


@contextmanager
def _progress(json: bool) -> Iterator[Any]:
    """How far it is: what takes longer than `_QUIET_S` has a line that changes, as ``qemu-img -p``
    has; only on a terminal. Or JSON, an object a line."""
    on_terminal = sys.stderr.isatty() and not json
    begun = time.monotonic()

    def show(figures: dict[str, Any]) -> None:
        if json:
            output.print_json(figures, indent=0)
        elif on_terminal and time.monotonic() - begun > _QUIET_S:
            sys.stderr.write(f"\r{_line(figures)}\x1b[K")
            sys.stderr.flush()

    try:
        yield show
    finally:
        if on_terminal:
            sys.stderr.write("\r\x1b[K")


def _line(figures: dict[str, Any]) -> str:
    """One copy in a line for people."""
    what = "what has changed is" if figures["incremental"] else "everything is"
    done = 100 * (1 - figures["left"] / figures["size"]) if figures["size"] else 100
    text = f"{what} {_WORDS[figures['kind']]} {figures['storage']}: {figures['phase']}"
    if figures["phase"] == "copying":
        text += f" ({done:.2f}/100%)"
    return f"{text} ({figures['why']})" if figures["why"] else text
