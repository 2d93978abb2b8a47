# SPDX-License-Identifier: Apache-2.0
"""The tables as people see them."""

from xvd.blkif.drawing import render_diagram, render_table
from xvd.blkif.handshake import BACKEND, FRONTEND


def test_tables_are_drawn() -> None:
    assert "| WAITING (2) | FRONTEND_INITIALISED, FRONTEND_CONNECTED | CONNECTING | CONNECT |" in (
        render_table(BACKEND)
    )
    assert '    CLOSED -> STARTING [label="REOPEN"];' in render_diagram(FRONTEND)
    assert "| any | ABANDON | ABANDONED | |" in render_table(FRONTEND)
    assert '"ABANDON"' not in render_diagram(FRONTEND)
