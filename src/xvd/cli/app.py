# SPDX-License-Identifier: Apache-2.0
"""The verbs, and the one place where an error becomes a line and an exit status.

Exit status: 0 success, 1 failure, 2 wrong usage; ``--run`` passes its command's status on. A verb
that a signal ends without being a daemon ends by that signal.
"""

import contextlib
import functools
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Final

import typer

from xvd import __version__
from xvd.cli import output, signals
from xvd.cli.output import OutputLost
from xvd.errors import ConfigError, XvdError, describe

app = typer.Typer(
    name="xvd",
    help="Xen virtual disks: both ends of the Xen paravirtual block device, in user space.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

VERBS: Final = {
    "serve": "serve.serve",
    "host": "host.host",
    "backend": "backend.backend",
    "attach": "attach.attach",
    "detach": "attach.detach",
    "resize": "resize.resize",
    "pause": "life.pause",
    "resume": "life.resume",
    "swap": "life.swap",
    "mirror": "copies.mirror",
    "backup": "copies.backup",
    "snapshot": "snapshots.SNAPSHOT",
    "disk": "info.DISK",
    "set": "tune.tune",
    "group": "tune.group",
    "list": "attach.list_disks",
    "nbd": "nbd.nbd",
    "stats": "stats.stats",
    "top": "top.top",
    "exporter": "exporter.exporter",
    "load": "load.load",
    "bench": "bench.bench",
    "sim": "sim.sim",
    "doctor": "doctor.doctor",
}
"""Each verb's module and function, or the table of the verbs behind it. Only what is asked for is
imported: a daemon that starts needs nothing of the others."""


def _exiting(verb: Callable[..., int]) -> Callable[..., None]:
    """A verb that ends the program with its result as the exit status."""

    @functools.wraps(verb)
    def run(*args: object, **kwargs: object) -> None:
        raise typer.Exit(verb(*args, **kwargs))

    return run


def _add(name: str) -> None:
    module, _, function = VERBS[name].partition(".")
    verb = getattr(import_module(f"xvd.cli.{module}"), function)
    if not isinstance(verb, dict):
        app.command(name)(_exiting(verb))
        return
    group = typer.Typer(name=name, no_args_is_help=True, help=", ".join(verb))
    for each, behind in verb.items():
        group.command(each)(_exiting(behind))
    app.add_typer(group)


def _show_version(wanted: bool) -> None:
    if wanted:
        output.tell(f"xvd {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Xen virtual disks: both ends of the Xen paravirtual block device, in user space."""


def _one_line(error: BaseException) -> str:
    return " ".join(describe(error).split())


def _complain(error: BaseException) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(f"xvd: {_one_line(error)}\n")


def run() -> int:
    """Run a verb and return its exit status; print what went wrong as one line on stderr."""
    try:
        signals.heed(signals.leave)
        wanted = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        for name in [wanted] if wanted in VERBS else VERBS:
            _add(name)
        return _ended()
    except ConfigError as error:
        _complain(error)
        return 2
    except OutputLost as error:
        output.drop()
        if not error.unread:
            _complain(error)
        return 1
    except (XvdError, OSError, MemoryError) as error:
        _complain(error)
        if not isinstance(error, XvdError):
            output.drop()  # it may be the output's own: a help text that found no room
        return 1
    except signals.Signalled as signalled:
        signals.die_by(signalled.number)


def _ended() -> int:
    """The status of a verb that has printed all it had to say."""
    try:
        app()
    except SystemExit as ended:
        status = ended.code
    else:
        status = 0
    output.tell("")
    return status if isinstance(status, int) else 0
