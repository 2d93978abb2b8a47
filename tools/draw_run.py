# SPDX-License-Identifier: Apache-2.0
"""Draw README's picture of a run: the tutorial's commands, run for real, with what they print.

Usage: ``draw_run.py`` runs all commands of docs/tutorial.md in a directory that is gone afterwards,
and writes some of them to docs/run.svg. It needs `xvd`, `qemu-img` and `qemu-io` in PATH.
"""

import io
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.text import Text

from pages import ROOT, Step, run_steps, steps_of

PICTURE: Final = ROOT / "docs" / "run.svg"
COLUMNS: Final = 92
TIMEOUT_S: Final = 100

SHOWN: Final = {
    "truncate": "# An image becomes a guest's disk.",
    "qemu-io -f raw -c 'write -P 0x5a": "# The guest writes to it.",
    "kill -KILL": "# The backend is killed. The guest's next write waits ...",
    "xvd backend > backend.log 2>&1 & backend=$!\nwait": "# ... until another takes the ring up.",
    "xvd pause": "# The disk moves to another image while the guest uses it.",
}
"""How the steps begin that are shown, and what is said above each; the rest runs unseen."""

Lines = list[tuple[str, str]]
"""Commands of one line each, with what they printed."""


def run_lines(page: str) -> list[Lines]:
    """Run all commands of the page, and return those of each step."""
    blocks = [step.commands.splitlines(keepends=True) for step in steps_of(page)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as directory:
        every = [Step(line, "", False) for block in blocks for line in block]
        environment = {**os.environ, "PATH": path}
        outputs = iter(run_steps(every, Path(directory), environment, TIMEOUT_S))
    return [[(line, next(outputs)) for line in block] for block in blocks]


def picture(steps: list[Lines]) -> str:
    """Return a terminal with what is shown, as SVG that asks for no font of another host."""
    console = Console(
        record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, highlight=False
    )
    for step in steps:
        commands = "".join(line for line, _ in step)
        for remark in (it for start, it in SHOWN.items() if commands.startswith(start)):
            console.print(Text(remark, style="bright_black"))
            for line, output in step:
                console.print(Text.assemble(("$ ", "green"), (line.rstrip(), "bold")))
                console.print(Text(output.replace("HERE", "/srv")), end="")
            console.print()
    drawn = console.export_svg(title="xvd", unique_id="run")
    return re.sub(r"\s*@font-face \{.*?\}\n", "\n", drawn, flags=re.DOTALL)


def main() -> int:
    steps = run_lines((ROOT / "docs" / "tutorial.md").read_text())
    PICTURE.write_text(picture(steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
