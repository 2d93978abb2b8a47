# SPDX-License-Identifier: Apache-2.0
"""The program starts fast: nothing is imported that a verb does not use."""

import inspect
import subprocess
import sys
from importlib import import_module

import pytest
from xvd_process import run_xvd

from xvd import __version__
from xvd.cli.overview import OPTIONS, overview
from xvd.cli.verbs import ABOUT, VERBS


def modules_after(code: str) -> set[str]:
    """What a fresh interpreter has imported when it has run some lines, with their packages."""
    lines = f"import sys\n{code}\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", lines], check=True, capture_output=True, text=True)
    names = done.stderr.split()
    return {name[:end] for name in names for end in (*dots(name), len(name))}


def dots(name: str) -> list[int]:
    return [at for at, letter in enumerate(name) if letter == "."]


HEAVY = {
    "rich", "textual", "matplotlib", "prometheus_client", "msgspec", "xvd.engines", "xvd.bench",
    "xvd.sim", "xvd.export", "xvd.backend.server", "xvd.frontend", "xvd.machine.emulated.host",
}  # fmt: skip
"""What takes long to import, and is of use to some verbs only."""

SERVING = {"msgspec", "xvd.engines", "xvd.backend.server", "xvd.machine.emulated.host"}
USED = {
    "serve": SERVING | {"xvd.frontend", "xvd.export"},
    "host": {"msgspec", "xvd.machine.emulated.host"},
    "backend": SERVING,
    "resize": {"xvd.engines"},  # how sizes are written
    "config": {"msgspec", "xvd.engines"},  # the layers that a file may name
    "nbd": {"msgspec", "xvd.export", "xvd.frontend", "xvd.machine.emulated.host"},
    "exporter": {"msgspec", "prometheus_client"},
    "load": SERVING | {"xvd.bench", "xvd.frontend"},
    "bench": SERVING | {"rich", "xvd.bench", "xvd.frontend"},
    "sim": SERVING | {"xvd.sim", "xvd.frontend"},
    "datapath": {"msgspec", "xvd.engines"},  # what there is to be served
    "doctor": {"xvd.engines", "xvd.frontend"},
}
"""What each verb uses of it; the others are questions to a daemon or to a store."""


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_imports_what_it_uses(verb: str) -> None:
    code = f"from xvd.cli import commands\ncommands.imported({verb!r})"

    assert modules_after(code) & HEAVY == USED.get(verb, set())


@pytest.mark.slow
@pytest.mark.parametrize("argument", ["--help", "-h", "--version"])
def test_the_help_needs_neither_typer_nor_an_event_loop(argument: str) -> None:
    code = f"from xvd.cli import app\nsys.argv = ['xvd', {argument!r}]\napp.run()"

    assert modules_after(code) & {*HEAVY, "typer", "click", "asyncio"} == set()


@pytest.mark.parametrize("verb", VERBS)
def test_the_list_of_verbs_says_what_each_says_of_itself(verb: str) -> None:
    where, line = VERBS[verb]
    module, _, function = where.partition(".")

    found = getattr(import_module(f"xvd.cli.{module}"), function)

    said = ", ".join(found) if isinstance(found, dict) else inspect.getdoc(found) or ""
    assert line == " ".join(said.partition("\n\n")[0].split())


def words(text: str) -> list[str]:
    return "".join(" " if letter in "│╭╮╰╯─," else letter for letter in text).split()


@pytest.mark.slow
def test_the_help_says_what_typers_help_says() -> None:
    """In another order where typer has columns for an option's names and its type."""
    ours = run_xvd("--help")
    typers = run_xvd("--help", "more")

    assert (ours.returncode, ours.stderr, typers.returncode) == (0, "", 0)
    assert sorted(words(ours.stdout)) == sorted(words(typers.stdout.replace("<bool>", "")))


@pytest.mark.slow
def test_without_a_verb_the_help_is_the_answer_and_the_usage_was_wrong() -> None:
    result = run_xvd()

    assert (result.returncode, result.stderr) == (2, "")
    assert result.stdout == run_xvd("-h").stdout


@pytest.mark.slow
def test_the_version_is_told_wherever_it_is_asked_for() -> None:
    assert run_xvd("--version").stdout == f"xvd {__version__}\n"
    assert run_xvd("--version", "list").stdout == f"xvd {__version__}\n"


def test_the_help_fills_the_screen_and_no_more() -> None:
    lines = overview(72, coloured=False)

    assert {len(line) for line in lines if line[:1] in tuple("│╭╰")} == {72}
    assert max(map(len, lines)) == 72
    assert f" {ABOUT}" not in lines  # it is longer than a line
    text = " ".join(words("\n".join(lines)))
    assert all(" ".join(words(line)) in text for line in OPTIONS.values())


def test_the_help_is_coloured_as_typers_on_a_terminal() -> None:
    lines = overview(80, coloured=True)

    assert lines[1] == " \x1b[1;33mUsage:\x1b[0m \x1b[1mxvd [OPTIONS] COMMAND [ARGS]...\x1b[0m"
    assert any(
        line.startswith("\x1b[2m│\x1b[0m \x1b[1;36mserve   \x1b[0m  Serve") for line in lines
    )


@pytest.mark.slow
def test_names_of_verbs_are_completed_without_their_modules() -> None:
    done = run_xvd(_XVD_COMPLETE="complete_bash", COMP_WORDS="xvd s", COMP_CWORD="1")

    assert done.stdout.split() == [verb for verb in VERBS if verb.startswith("s")]
