# SPDX-License-Identifier: Apache-2.0
"""docs/protocol.md shows the tables that the code has."""

from pathlib import Path

from xvd.blkif.drawing import render_diagram, render_table
from xvd.blkif.handshake import BACKEND, FRONTEND

PAGE = Path(__file__).resolve().parents[2] / "docs/protocol.md"


def test_the_page_has_both_tables_and_both_diagrams() -> None:
    page = PAGE.read_text()

    drawn = [
        draw(table) for table in (BACKEND, FRONTEND) for draw in (render_table, render_diagram)
    ]

    # Fresh when each is there whole; otherwise run tools/draw_handshake.py --write.
    assert [text in page for text in drawn] == [True] * 4
