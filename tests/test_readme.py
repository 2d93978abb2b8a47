# SPDX-License-Identifier: Apache-2.0
"""README's snippets do what they say as they stand, from top to bottom; so do the examples."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pages import Snippet, snippets_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TIMEOUT_S = 60

INSTALLING = ("make demo", "make test", "make setup", "make wheel", "make deb")
"""How the lines begin that build and install; `.ci/run`, and the two last, try what they do."""


def installs(snippet: Snippet) -> bool:
    return snippet.text.startswith(INSTALLING)


RUN = {"sh": ("bash", "-euc"), "python": (sys.executable, "-Werror", "-c")}
"""Language: what runs a snippet of it."""

IN_ONE_PROCESS = "Images are identical.\n"
IN_PYTHON = "bytearray(b'any size')\n"
OUTPUTS = (IN_ONE_PROCESS, IN_PYTHON)
"""What README's snippets print, in their order."""


def run(command: Sequence[str], directory: Path) -> tuple[int, str]:
    """The exit status and all output; what it left running ends as well."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    seen = directory / ".output"
    with seen.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=directory, env={**os.environ, "PATH": path}, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            status = process.wait(TIMEOUT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = seen.read_text().replace(str(directory.resolve()), "HERE")
    seen.unlink()
    return status, text


def test_every_block_is_run_or_exempt_by_name() -> None:
    """No snippet escapes by its form, and no exemption outlives what it was for."""
    snippets = snippets_of(README)
    assert {snippet.language for snippet in snippets} <= {"text", *RUN}
    shown = "".join(snippet.text for snippet in snippets if installs(snippet))
    lines = shown.strip().splitlines()
    assert [line for line in lines if not line.startswith(INSTALLING)] == []
    assert [word for word in INSTALLING if word not in shown] == []


def test_what_installs_is_in_the_makefile() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = set(re.findall(r"\bmake (\w+)", "\n".join(it.text for it in snippets_of(README))))
    assert named
    assert named <= set(targets)


def test_the_blocks_of_a_page_are_found() -> None:
    page = "words\n\n    a\n\n    b\n\nwords\n\n```python\nc\n```\n\n- item\n"
    assert snippets_of(page) == [Snippet("sh", "a\n\nb\n"), Snippet("python", "c\n")]


@pytest.mark.slow
def test_snippets_run_as_they_stand(tmp_path: Path, requires_tool: Callable[[str], str]) -> None:
    requires_tool("qemu-img")
    snippets = [it for it in snippets_of(README) if it.language in RUN and not installs(it)]

    outcomes = [run((*RUN[it.language], it.text), tmp_path) for it in snippets]

    assert outcomes == [(0, text) for text in OUTPUTS]


EXAMPLES = {
    "backup.py": """\
64 MiB read, 1 MiB written, SHA-256 35296b7aed95c9c9...
the copy is the same
""",
    "image.py": """\
a disk of 16 MiB in blocks of 512 bytes
through the ring: b'any size, any alignment'
a write is refused: the disk is read-only
in the file: 8 times, first at 12345
""",
    "lying_backend.py": """\
honest                        well
garbage for a size            well
an answer to nothing          well
another operation             well
more answers than requests    well
an error                      well
a status that nobody knows    well
gone in the middle            well
""",
    "own_engine.py": """\
16 blocks written, 1 kept
16 blocks written, 2 kept
at 3 MiB: b'another' and before: b'the same'
0 blocks written, 0 kept
""",
}
"""Example: what it prints."""


def test_every_example_in_python_is_run() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    command = (sys.executable, "-Werror", str(ROOT / "examples" / name))

    outcome = run(command, tmp_path)

    assert outcome == (0, EXAMPLES[name])
    assert list(tmp_path.iterdir()) == []
