# SPDX-License-Identifier: Apache-2.0
"""What the pages say: their links and anchors, and the blocks of code that can be run.

Usage: ``pages.py`` checks README.md, the other pages of the top level and docs/: every page of
docs/ is in the navigation of mkdocs.yml, every relative link leads to a file and its anchor to a
heading, and every other link has the form of one. It exits with 1 and names what is wrong. Anchors
are those that GitHub makes and mkdocs.yml asks for.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit

ROOT: Final = Path(__file__).resolve().parent.parent

# ---- Blocks of code ----------------------------------------------------------------------------

FENCED: Final = r"^```([\w-]*)\n((?:.*\n)*?)```$"
INDENTED: Final = r"(^ {4}.*\n(?:\n*^ {4}.*\n)*)"
BLOCK: Final = re.compile(f"{FENCED}|{INDENTED}", re.MULTILINE)


class Snippet(NamedTuple):
    """A block of code: what it is written in, and its text."""

    language: str
    text: str


def snippets_of(page: str) -> list[Snippet]:
    """Return the blocks of a page.

    Fenced ones say their language, and indented ones are for the shell.
    """
    found = []
    for language, fenced, indented in BLOCK.findall(page):
        shell = re.sub(r"^ {4}", "", indented, flags=re.MULTILINE)
        found.append(Snippet(language, fenced) if fenced else Snippet("sh", shell))
    return found


class Step(NamedTuple):
    """Commands, and the output that a page shows below them; its numbers may vary."""

    commands: str
    output: str
    varies: bool


OUTPUTS: Final = {"text": False, "figures": True}
"""Languages of blocks that are output: whether its numbers vary."""


def steps_of(page: str) -> list[Step]:
    """Return the blocks that are fenced as ``sh``, each with the output that follows it."""
    found: list[Step] = []
    for language, fenced, _ in BLOCK.findall(page):
        if language == "sh":
            found.append(Step(fenced, "", False))
        elif language in OUTPUTS:
            found[-1] = found[-1]._replace(output=fenced, varies=OUTPUTS[language])
    return found


MARK: Final = "\x1e"
ENDED: Final = re.compile(rf"[^\n{MARK}]*line \d+: +\d+ (?:Killed|Terminated) .*\n")
"""What bash says of a job that was killed; a terminal says it in other words."""


def run_steps(
    steps: Sequence[Step], directory: Path, environment: Mapping[str, str], timeout: float
) -> list[str]:
    """Run the commands of all steps in one bash, and return the output of each.

    The directory stands in it as HERE. What the commands leave running ends too. Raises
    `subprocess.TimeoutExpired` after `timeout` seconds.
    """
    script = "".join(f"{step.commands}printf '{MARK}'\n" for step in steps)
    seen = directory / ".output"
    with seen.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-uc", script], cwd=directory, env=dict(environment), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            process.wait(timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = ENDED.sub("", seen.read_text()).replace(str(directory.resolve()), "HERE")
    seen.unlink()
    return text.split(MARK)[: len(steps)]


NUMBER: Final = re.compile(r"\d+(?:[.:]\d+)*(?:e[+-]\d+)?")


def without_figures(text: str) -> str:
    """Return a text with all numbers alike, and the blanks and units that go with them."""
    alike = re.sub(r"\b[KMGT]iB/sec", "bytes/sec", NUMBER.sub("0", text))
    # qemu-io tells times of more than a second in another way.
    return re.sub(" +", " ", alike).replace("ops; 0 sec (", "ops; 0 (")


# ---- Links -------------------------------------------------------------------------------------

CODE: Final = re.compile(
    r"^```.*?^```$|^ {4}[^\n]*$|`[^`\n]*`|<!--.*?-->", re.MULTILINE | re.DOTALL
)
LINK: Final = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]*)\)")
HEADING: Final = re.compile(r"^#{1,6} +(.*?) *$", re.MULTILINE)


def pages() -> list[Path]:
    """Return every page that people read, those that lie in the tree's top level too."""
    return sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md"))


def anchors(page: str) -> set[str]:
    """Return the anchors of a page's headings."""
    fenced = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    slugs: Counter[str] = Counter()
    found = set()
    for heading in HEADING.findall(fenced):
        text = LINK.sub(r"\2", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.add(f"{slug}-{slugs[slug]}" if slugs[slug] else slug)
        slugs[slug] += 1
    return found


def navigation() -> list[str]:
    """Return the pages of the navigation in mkdocs.yml, in their order."""
    _, _, nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")
    return re.findall(r": ([\w/-]+\.md)$", nav, re.MULTILINE)


def wrong_link(page: Path, target: str) -> str:
    """Return what is wrong with a link of a page; empty if nothing is."""
    parts = urlsplit(target)
    if parts.scheme:
        good = parts.scheme in ("http", "https") and re.fullmatch(r"[\w.-]+\.\w+", parts.netloc)
        return "" if good else "no address of the web"
    place = (page.parent / parts.path).resolve() if parts.path else page
    if not place.exists():
        return "no such file"
    if not place.is_relative_to(ROOT):
        return "outside of the tree"
    if parts.fragment and parts.fragment not in anchors(place.read_text()):
        return "no such heading"
    return ""


def complaints() -> Iterator[str]:
    """Yield everything that is wrong, each as a line."""
    listed, present = navigation(), [path.name for path in sorted((ROOT / "docs").glob("*.md"))]
    yield from (f"mkdocs.yml: docs/{name} is not in nav" for name in present if name not in listed)
    yield from (f"mkdocs.yml: nav has no docs/{name}" for name in listed if name not in present)
    for page in pages():
        for mark, text, target in LINK.findall(CODE.sub("", page.read_text())):
            name = page.relative_to(ROOT)
            if why := wrong_link(page, target):
                yield f"{name}: {mark}[{text}]({target}): {why}"
            elif mark and not text:
                yield f"{name}: ![]({target}): a picture needs words for those who do not see it"


if __name__ == "__main__":
    wrong = list(complaints())
    print("\n".join(wrong) or "the links of all pages are in order")
    sys.exit(1 if wrong else 0)
