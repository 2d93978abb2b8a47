# SPDX-License-Identifier: Apache-2.0
"""``xvd``: the verbs, and the one place where an error becomes a line and an exit status.

Exit status: 0 success, 1 failure, 2 wrong usage; ``--run`` passes its command's status on.
"""

import functools
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Final

import typer

from xvd import __version__
from xvd.errors import ConfigError, XvdError

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
    "set": "tune.tune",
    "list": "attach.list_disks",
    "nbd": "nbd.nbd",
    "stats": "stats.stats",
    "top": "top.top",
    "load": "load.load",
    "bench": "bench.bench",
    "sim": "sim.sim",
    "doctor": "doctor.doctor",
}
"""Each verb's module and function. Only what is asked for is imported: a daemon that starts needs
nothing of the others."""


def _exiting(verb: Callable[..., int]) -> Callable[..., None]:
    """A verb that ends the program with its result as the exit status."""

    @functools.wraps(verb)
    def run(*args: object, **kwargs: object) -> None:
        raise typer.Exit(verb(*args, **kwargs))

    return run


def _add(name: str) -> None:
    module, _, function = VERBS[name].partition(".")
    verb: Callable[..., int] = getattr(import_module(f"xvd.cli.{module}"), function)
    app.command(name)(_exiting(verb))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"xvd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Xen virtual disks: both ends of the Xen paravirtual block device, in user space."""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def main() -> None:
    """Run a verb; print what went wrong as one line on stderr."""
    wanted = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    for name in [wanted] if wanted in VERBS else VERBS:
        _add(name)
    try:
        app()
    except ConfigError as error:
        sys.stderr.write(f"xvd: {_one_line(error)}\n")
        sys.exit(2)
    except (XvdError, OSError) as error:
        sys.stderr.write(f"xvd: {_one_line(error)}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
