# SPDX-License-Identifier: Apache-2.0
"""Put the handshake's tables and diagrams into docs/protocol.md, or check what is there.

Usage: ``draw_handshake.py --write`` replaces all that follows the marker in the page,
``draw_handshake.py --check`` exits with 1 when that is not what would be written.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/protocol.md"
MARKER = "<!-- From here on written by tools/draw_handshake.py -->\n"
sys.path.insert(0, str(ROOT / "src"))

from xvd.blkif import drawing, handshake  # noqa: E402


def drawn() -> str:
    parts = [MARKER]
    for title, table in (("backend", handshake.BACKEND), ("frontend", handshake.FRONTEND)):
        parts.append(f"\n### The {title}\n\n{drawing.render_table(table)}")
        parts.append(f"\n```mermaid\n{drawing.render_diagram(table)}```\n")
    return "".join(parts)


def main(arguments: list[str]) -> int:
    head, marker, tail = PAGE.read_text().partition(MARKER)
    if arguments == ["--write"]:
        PAGE.write_text(head + drawn())
    elif marker + tail != drawn():
        print(f"{PAGE.name} is stale: run tools/draw_handshake.py --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
