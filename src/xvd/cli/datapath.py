# SPDX-License-Identifier: Apache-2.0
"""``xvd datapath``: a call of xapi's storage interface, by the scripts of contrib/xapi."""

import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from xvd import __version__
from xvd.cli import common, output, running
from xvd.cli.daemons import ALIVE, DEAD, ask_all, ask_one
from xvd.errors import PeerClosed, describe
from xvd.toolstack.datapath import Fault, Plugin

_FAILED = "XVD_FAILED"


class _Daemons:
    """The backend of dom0, by its control sockets."""

    def __init__(self, host: Path) -> None:
        self._host = host

    async def kinds(self) -> list[str]:
        """See `Backend.kinds`."""
        answer = await ask_one(self._host / "control" / "backend-0", "kinds")
        if answer.state != ALIVE:
            raise PeerClosed(f"{answer.socket}: no backend answers")
        return list(answer.result)

    async def images(self, domid: int) -> list[str]:
        """See `Backend.images`."""
        try:
            answers = await ask_all(self._host, "backend-*", "stats")
        except PeerClosed:
            return []
        hung = [it.daemon for it in answers if it.state not in (ALIVE, DEAD)]
        if hung:
            raise PeerClosed(f"{', '.join(hung)}: no answer")
        return [
            figures["image"]
            for answer in answers
            for figures in answer.result or ()
            if figures["path"].split("/")[-2] == str(domid)
        ]


def datapath(
    call: Annotated[str, typer.Argument(help="The call: Datapath.attach, Plugin.Query.")],
    host: common.HostDir = common.DEFAULT_HOST,
    json: Annotated[  # noqa: ARG001  xapi says it to every script
        bool, typer.Option("--json", help="Take and give JSON, as always.")
    ] = False,
) -> int:
    """Answer a call of xapi's storage interface (SMAPIv3) about storage that xvd backend serves.

    The arguments are a JSON object on standard input, the answer is a JSON value. A call that fails
    prints an object with code, params and backtrace, and the status is 1. See docs/toolstacks.md.
    """
    plugin = Plugin(host / "datapath", _Daemons(host), __version__)
    answer: object = None

    async def ask() -> int:
        nonlocal answer
        answer = await plugin.call(call, sys.stdin.read())
        return 0

    try:
        status = running.run(ask())
    except Exception as error:  # whatever it is: xapi shows what is printed
        common.complain(f"{call}: {describe(error)}")
        answer, status = fault_of(error), 1
    output.print_json(answer, indent=0)
    return status


def fault_of(error: Exception) -> dict[str, Any]:
    """Return an error in xapi's shape."""
    frames = traceback.extract_tb(error.__traceback__)
    code = str(error.code) if isinstance(error, Fault) else _FAILED
    return {
        "code": code,
        "params": [describe(error)],
        "backtrace": {
            "error": f"{type(error).__name__}: {describe(error)}",
            "files": [Path(frame.filename).name for frame in frames],
            "lines": [frame.lineno or 0 for frame in frames],
        },
    }
