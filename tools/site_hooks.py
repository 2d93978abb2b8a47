# SPDX-License-Identifier: Apache-2.0
"""Let the site's pages link to files of the tree: mkdocs sees docs/ alone.

A link to such a file leads to a copy of it under `tree/`; one to a folder, to the list of its
files.
"""

import posixpath
import re
from pathlib import Path
from typing import Any, Final

from mkdocs.structure.files import File, InclusionLevel

ROOT: Final = Path(__file__).resolve().parent.parent
OUTSIDE: Final = re.compile(r"\]\(\.\./([^)#\s]+)\)")


def on_files(files: Any, *, config: Any) -> Any:
    """Add what pages link to outside of docs/."""
    pages = [page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))]
    named = {posixpath.normpath(name) for page in pages for name in OUTSIDE.findall(page)}
    for path in sorted({path for name in named for path in members(ROOT / name)}):
        copied = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, f"tree/{copied}", abs_src_path=str(path)))
    for name in sorted(name for name in named if (ROOT / name).is_dir()):
        listed = "".join(f"- [{it.name}]({it.name})\n" for it in members(ROOT / name))
        files.append(
            File.generated(
                config, f"tree/{name}/index.md", content=f"# {name}/\n\n{listed}",
                inclusion=InclusionLevel.NOT_IN_NAV,
            )
        )  # fmt: skip
    return files


def members(path: Path) -> list[Path]:
    """Return the file itself, or the files of a folder."""
    return sorted(it for it in path.iterdir() if it.is_file()) if path.is_dir() else [path]


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Turn links out of docs/ into links to the copies."""

    def copied(link: re.Match[str]) -> str:
        name = posixpath.normpath(link[1])
        return f"](tree/{name}/index.md)" if (ROOT / name).is_dir() else f"](tree/{name})"

    return OUTSIDE.sub(copied, markdown)
