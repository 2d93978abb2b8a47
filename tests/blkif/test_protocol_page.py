# SPDX-License-Identifier: Apache-2.0
"""docs/protocol.md shows the tables that the code has, and pictures of them."""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from xvd.blkif.handshake import BACKEND, FRONTEND, Step

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "docs" / "handshake"

Table = Mapping[tuple[Any, Any], Step[Any, Any]]


def test_the_page_and_its_pictures_are_those_of_the_tables() -> None:
    """Otherwise run tools/draw_handshake.py --write."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "draw_handshake.py"), "--check"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("name", "table"), [("backend", BACKEND), ("frontend", FRONTEND)])
def test_a_picture_has_every_step_from_one_state_to_another(name: str, table: Table) -> None:
    shown = " ".join(ElementTree.parse(PICTURES / f"{name}.svg").getroot().itertext())
    arrows = set(re.findall(r"(\w+)->(\w+)", shown))
    words = set(re.findall(r"(\w+) → (\w+)", shown))
    states = {state for state, _ in table}
    known = Counter(event for _, event in table)
    steps = {
        (state.name, step.state.name)
        for (state, event), step in table.items()
        if step.state is not state and known[event] < len(states) and "REMOVE" not in event.name
    }

    assert len(steps) > 10
    assert steps - arrows == set()
    assert all(state.name in shown for state in states)
    assert ("REMOVE", "REMOVING") in words or name == "frontend"


def test_no_page_has_a_picture_that_takes_a_script() -> None:
    pages = sorted((ROOT / "docs").glob("*.md"))

    assert [page.name for page in pages if "```mermaid" in page.read_text()] == []
