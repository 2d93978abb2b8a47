# SPDX-License-Identifier: Apache-2.0
"""The tutorial's commands do what the page says, from top to bottom."""

import html
import os
import re
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from pages import ROOT, Step, run_steps, snippets_of, steps_of, without_figures

PAGE = (ROOT / "docs" / "tutorial.md").read_text()
TYPED_ONCE = (
    "make setup && export PATH=$PWD/.venv/bin:$PATH\n",
    "mkdir ~/tour && cd ~/tour\n",
)
"""The blocks that prepare the rest: here the tests' environment and a directory do."""
TIMEOUT_S = 100


def shown(step: Step, output: str) -> str:
    """What is compared of an output."""
    return without_figures(output) if step.varies else output


@pytest.mark.slow
def test_every_command_prints_what_the_page_shows(
    tmp_path: Path, requires_tool: Callable[[str], str]
) -> None:
    for tool in ("qemu-img", "qemu-io"):
        requires_tool(tool)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    steps = steps_of(PAGE)

    outputs = run_steps(steps, tmp_path, {**os.environ, "PATH": path}, TIMEOUT_S)

    assert [shown(step, seen) for step, seen in zip(steps, outputs, strict=True)] == [
        shown(step, step.output) for step in steps
    ]


def test_every_block_is_run_or_prepares_the_rest() -> None:
    """No command escapes by its form."""
    snippets = snippets_of(PAGE)

    assert {it.language for it in snippets} == {"sh", "text", "figures"}
    assert len(steps_of(PAGE)) + len(TYPED_ONCE) == sum(it.language == "sh" for it in snippets)
    assert all(text in [it.text for it in snippets] for text in TYPED_ONCE)


def test_the_picture_of_a_run_shows_commands_of_the_tutorial() -> None:
    """Else `tools/draw_run.py` has to draw it anew."""
    lines = re.findall(r"<text [^>]*>(.*?)</text>", (ROOT / "docs" / "run.svg").read_text())
    words = [html.unescape(line).replace("\xa0", " ") for line in lines]
    typed = [command.strip() for prompt, command in pairwise(words) if prompt.strip() == "$"]

    assert len(typed) > 10
    assert set(typed) <= set(PAGE.splitlines())


def test_the_outputs_of_steps_are_told_apart(tmp_path: Path) -> None:
    """Standard error is output too, and what bash says of a job that was killed is none."""
    steps = steps_of(
        "```sh\npwd\n```\n```text\nHERE\n```\n"
        "```sh\nsleep 99 & kill -KILL $!; wait $!\n```\n"
        "```sh\necho 3 >&2\n```\n```figures\n1\n```\n"
    )

    outputs = run_steps(steps, tmp_path, os.environ, TIMEOUT_S)

    assert outputs == ["HERE\n", "", "3\n"]
    assert [step.varies for step in steps] == [False, False, True]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1 MiB, 1 ops; 00.03 sec (32.3 MiB/sec", "1 MiB, 1 ops; 0:00:01.04 (984.6 KiB/sec"),
        ("mapped  182.0", "mapped 6.7108864e+07"),
    ],
)
def test_figures_may_vary_and_words_may_not(one: str, other: str) -> None:
    assert without_figures(one).replace(" sec", "") == without_figures(other).replace(" sec", "")
    assert without_figures(one) != without_figures(f"{other} of 3")
