# SPDX-License-Identifier: Apache-2.0
"""Put the handshake's tables into docs/protocol.md and its diagrams beside it, or check them.

Usage: ``draw_handshake.py --write`` replaces all that follows the marker in the page, and draws
docs/handshake/*.svg by Graphviz's dot. ``draw_handshake.py --check`` exits with 1 when that is not
what would be written; it needs no dot, as each picture has the digest of what it was drawn from.
"""

import hashlib
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = ROOT / "docs/protocol.md"
PICTURES: Final = ROOT / "docs/handshake"
MARKER: Final = "<!-- From here on written by tools/draw_handshake.py -->\n"
sys.path.insert(0, str(ROOT / "src"))

from xvd.blkif import drawing, handshake  # noqa: E402

TABLES: Final[dict[str, Mapping[Any, Any]]] = {
    "backend": handshake.BACKEND,
    "frontend": handshake.FRONTEND,
}


def written() -> str:
    """Return the part of the page."""
    parts = [MARKER]
    for title, table in TABLES.items():
        picture = f"handshake/{title}.svg"
        parts.append(f"\n### The {title}\n\n{drawing.render_table(table)}")
        parts.append(
            f"\n[![The states of a {title}, and what leads from one to another]({picture})]"
        )
        parts.append(f"({picture})\n")
    return "".join(parts)


def mark(graph: str) -> str:
    """Return how a picture says what it was drawn from."""
    return f"<!-- tools/draw_handshake.py, {hashlib.sha256(graph.encode()).hexdigest()} -->"


def draw(title: str, graph: str) -> None:
    """Write a picture; raises OSError without dot."""
    done = subprocess.run(["dot", "-Tsvg"], input=graph, capture_output=True, text=True, check=True)
    svg = re.sub(r"<!--.*?-->\n?|<!DOCTYPE.*?>\n?", "", done.stdout, flags=re.DOTALL)
    head, declaration, rest = svg.partition("?>\n")
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / f"{title}.svg").write_text(f"{head}{declaration}{mark(graph)}\n{rest}")


def stale() -> list[str]:
    """Return the files that are not what would be written."""
    _, marker, tail = PAGE.read_text().partition(MARKER)
    found = [] if marker + tail == written() else [PAGE.name]
    for title, table in TABLES.items():
        path = PICTURES / f"{title}.svg"
        if not path.exists() or mark(drawing.render_diagram(table)) not in path.read_text():
            found.append(path.name)
    return found


def main(arguments: list[str]) -> int:
    if arguments == ["--write"]:
        PAGE.write_text(PAGE.read_text().partition(MARKER)[0] + written())
        try:
            for title, table in TABLES.items():
                draw(title, drawing.render_diagram(table))
        except FileNotFoundError:
            print("there is no dot, which draws: apt-get install graphviz", file=sys.stderr)
            return 1
    elif names := stale():
        print(f"{', '.join(names)}: run tools/draw_handshake.py --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
