# SPDX-License-Identifier: Apache-2.0
"""The verbs as typer's commands. Only what is asked for is imported: a daemon that starts needs
nothing of the others, nor does completion of a verb's name."""

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command, get_group

from xvd import __version__
from xvd.cli import output
from xvd.cli.overview import HELP_OPTIONS, OPTIONS
from xvd.cli.verbs import ABOUT, VERBS


class Verbs(TyperGroup):
    """The program: its verbs are found in `VERBS`, and imported when one is run."""

    _listing = False

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002  typer calls it so
        """Every verb, in the order of the help."""
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002  typer calls it so
        """The verb with this name, or None. In a list of verbs there is only its line."""
        if cmd_name not in VERBS:
            return None
        if self._listing:
            return TyperCommand(cmd_name, help=VERBS[cmd_name][1])
        return imported(cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The help of the program itself."""
        self._listing = True
        super().format_help(ctx, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """The verbs and options that begin so."""
        self._listing = True
        return super().shell_complete(ctx, incomplete)


def _exiting(verb: Callable[..., int]) -> Callable[..., None]:
    """A verb that ends the program with its result as the exit status."""

    @functools.wraps(verb)
    def run(*args: object, **kwargs: object) -> None:
        raise typer.Exit(verb(*args, **kwargs))

    return run


def imported(name: str) -> Any:
    """Import a verb, and return it as typer's command."""
    module, _, function = VERBS[name][0].partition(".")
    verb = getattr(import_module(f"xvd.cli.{module}"), function)
    if not isinstance(verb, dict):
        alone = typer.Typer(name=name, add_completion=False)
        alone.command(name)(_exiting(verb))
        return get_command(alone)
    group = typer.Typer(name=name, no_args_is_help=True, help=", ".join(verb))
    for each, behind in verb.items():
        group.command(each)(_exiting(behind))
    return get_group(group)


def _show_version(wanted: bool) -> None:
    if wanted:
        output.tell(f"xvd {__version__}\n")
        raise typer.Exit


app: Final = typer.Typer(
    name="xvd",
    cls=Verbs,
    help=ABOUT,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": list(HELP_OPTIONS)},
)


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help=OPTIONS["--version"]
    ),
) -> None:
    pass


_options.__doc__ = ABOUT
