# SPDX-License-Identifier: Apache-2.0
"""The man pages have all that ``--help`` has, and no program that shows them complains."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from xvd.cli.commands import imported
from xvd.cli.verbs import VERBS
from xvd.engines.uri import LAYERS, SCHEMES
from xvd.service.configuration import TABLES

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "SEE ALSO"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("man")
    subprocess.run([sys.executable, str(ROOT / "tools/print_man.py"), str(made)], check=True)
    return made


def plain(text: str) -> str:
    """A page's roff without what is there for roff only."""
    return re.sub(r"\\f[BIP]|\\&", "", text).replace("\\-", "-").replace("\\(aq", "'")


def commands_of(verb: str) -> Iterator[tuple[str, Any]]:
    """(the heading of the part of its page that is about it, the command), of a verb's commands."""
    command = imported(verb)
    behind = getattr(command, "commands", {})
    yield from ((f'.SS "xvd {verb} {name}"\n', one) for name, one in behind.items())
    if not behind:
        yield '.SH "OPTIONS"\n', command


def heads(text: str) -> list[str]:
    """The first lines of a text's items."""
    return re.findall(r"^\.TP\n(.*)$", text, re.MULTILINE)


def test_every_verb_has_a_page_and_no_other(directory: Path) -> None:
    pages = {f"xvd-{verb}.1" for verb in VERBS} | {"xvd.1", "xvd.toml.5", "xvd-storage.7"}

    assert {path.name for path in directory.iterdir()} == pages


@pytest.mark.parametrize("verb", VERBS)
def test_a_page_has_every_argument_and_option(directory: Path, verb: str) -> None:
    page = plain((directory / f"xvd-{verb}.1").read_text())

    for heading, command in commands_of(verb):
        _, found, rest = page.partition(heading)
        items = heads(re.split(r"^\.S[SH] ", rest, flags=re.MULTILINE)[0])
        words = [set(re.split(r"[ ,]+", head)) for head in items]
        options = [it for it in command.params if it.param_type_name == "option"]

        assert found, heading
        assert len(items) == len(command.params) + 1  # and --help
        assert [it.opts for it in options if not any(set(it.opts) <= had for had in words)] == []


@pytest.mark.parametrize("verb", VERBS)
def test_a_page_has_the_usual_sections_in_their_order(directory: Path, verb: str) -> None:
    text = (directory / f"xvd-{verb}.1").read_text()
    sections = re.findall(r'^\.SH "(.*)"$', text, re.MULTILINE)
    wanted = SECTIONS
    if ".SS " in text:  # the verbs behind a verb have a description and options each
        wanted = ["NAME", "SYNOPSIS", "COMMANDS", "EXIT STATUS", "SEE ALSO"]

    assert [name for name in sections if name not in ("ENVIRONMENT", "FILES")] == wanted


def test_the_programs_page_lists_every_verb(directory: Path) -> None:
    items = heads(plain((directory / "xvd.1").read_text()))

    assert [head for head in items if head.endswith("(1)")] == [f"xvd-{verb}(1)" for verb in VERBS]


def test_the_page_of_settings_has_every_name(directory: Path) -> None:
    items = heads(plain((directory / "xvd.toml.5").read_text()))
    named = [names for names, by_name in TABLES.values() if not by_name]

    wanted = [name for names in named for name in names.__struct_fields__]

    assert items == [*wanted, "/etc/xvd/xvd.toml"]


def test_the_page_of_storage_has_every_scheme_and_layer(directory: Path) -> None:
    items = heads(plain((directory / "xvd-storage.7").read_text()))
    forms = [form for head in items for form in re.split(r",\s", head)]

    assert {it.form for it in SCHEMES.values()} | LAYERS.keys() == set(forms)


def names_of_pages(text: str) -> set[str]:
    return set(re.findall(r"^(xvd[\w.-]*)\((\d)\),?$", plain(text), re.MULTILINE))


def test_pages_name_only_pages_that_there_are(directory: Path) -> None:
    named = {
        f"{name}.{number}"
        for path in directory.iterdir()
        for name, number in names_of_pages(path.read_text())
    }

    assert named <= {path.name for path in directory.iterdir()}


@pytest.mark.slow
@pytest.mark.tools
@pytest.mark.parametrize(
    "command",
    [("man", "--warnings", "-E", "UTF-8", "-Tutf8", "-Z", "-l"),
     ("mandoc", "-Tlint", "-Wwarning")],
)  # fmt: skip
def test_what_shows_pages_has_nothing_to_complain(
    directory: Path, command: tuple[str, ...], requires_tool: Callable[[str], str]
) -> None:
    pages = map(str, sorted(directory.iterdir()))

    done = subprocess.run(
        [requires_tool(command[0]), *command[1:], *pages], check=False, capture_output=True,
        text=True, env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "MANWIDTH": "80"},
    )  # fmt: skip

    complaints = done.stderr if command[0] == "man" else done.stdout + done.stderr
    assert (done.returncode, complaints) == (0, "")
