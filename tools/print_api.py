# SPDX-License-Identifier: Apache-2.0
"""Print docs/api.md from the docstrings of what programs use, or check what is there.

Usage: ``print_api.py --write`` writes the page, ``print_api.py --check`` exits with 1 when it is
not what would be written.
"""

import ast
import dataclasses
import enum
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

import xvd  # noqa: E402
from xvd import embed, errors, testing  # noqa: E402

COLUMNS: Final = 100
PAGE: Final = ROOT / "docs" / "api.md"

HEAD: Final = """\
<!-- tools/print_api.py --write prints this page from the docstrings. -->
# The Python interface

A program uses xvd for the disk of an image in one call, for a disk of a guest that is there, for
storage of its own, and for a backend that lies, in a test of a driver. `import xvd` imports nothing
else; each name brings what it needs when it is first asked for. All of it is typed (`py.typed`).
[examples/](../examples) has programs that run, and [settings.md](settings.md) the settings of both
ends.
"""

EXCEPTIONS: Final = [
    it for it in vars(errors).values() if inspect.isclass(it) and it.__module__ == errors.__name__
]

SECTIONS: Final[dict[str, list[Any]]] = {
    "A disk in one call": [xvd.EmulatedHost, embed.Serving, xvd.open_image, xvd.emulated],
    "A disk": [xvd.Disk, xvd.SyncDisk],
    "Storage of one's own": [xvd.Engine, xvd.EngineInfo, xvd.ThreadModel],
    "For tests of a driver": [testing.raw_backend, testing.RawBackend],
    "Errors": EXCEPTIONS,
}
"""Heading: what stands below it."""


def text_of(doc: str | None) -> str:
    """Return a docstring as Markdown."""
    return inspect.cleandoc(doc or "").replace("``", "`")


OMITTED: Final = {
    *("Disk.connected", "Disk.resized", "Disk.disconnected", "Disk.ended", "Disk.device"),
    *("Disk.attach", "Disk.wake", "Disk.detach", "Disk.change", "Disk.blocks_of", "Disk.open"),
}
"""What a disk has for its device, for its exports, and for whoever has a machine and a store."""


def source_of(what: Any) -> ast.stmt:
    """Return the definition as it was written."""
    return ast.parse(textwrap.dedent(inspect.getsource(what))).body[0]


def annotation(node: ast.expr | None) -> str:
    """Return a type, also one that stands in quotes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return ast.unparse(node) if node else ""


def signature(what: Callable[..., Any], name: str) -> str:
    """Return how it is called: as it was written, without `self`."""
    node = source_of(what)
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    node.args.args = [it for it in node.args.args if it.arg not in ("self", "cls")]
    shown = ast.parse(f"def f({ast.unparse(node.args)}): pass").body[0]
    parameters = ast.unparse(shown).partition("(")[2].rpartition("):")[0]
    word = "await " if isinstance(node, ast.AsyncFunctionDef) else ""
    if any("asynccontextmanager" in ast.unparse(it) for it in node.decorator_list):
        word = "async with "
    return call(f"{word}{name}", parameters, annotation(node.returns))


def call(name: str, parameters: str, result: str) -> str:
    """Return a call as a block of code, a parameter a line where it would be too long."""
    arrow = f" -> {result}" if result and result != "None" else ""
    text = f"{name}({parameters}){arrow}"
    if len(text) > COLUMNS:
        each = re.split(r", (?![^\[(]*[\])])", parameters)
        text = f"{name}(\n" + "".join(f"    {it},\n" for it in each) + f"){arrow}"
    return f"```text\n{text}\n```\n"


def members(kind: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties of a class, the nearest definition first."""
    seen: set[str] = set()
    for base in kind.__mro__:
        if not base.__module__.startswith("xvd."):
            continue
        for name, member in vars(base).items():
            public = not name.startswith("_") and (
                isinstance(member, property | classmethod | staticmethod)
                or inspect.isfunction(member)
            )
            if public and name not in seen and f"{kind.__name__}.{name}" not in OMITTED:
                seen.add(name)
                yield name, member


def fields(kind: type) -> Iterator[tuple[str, str, str]]:
    """The names that a class gives values: (name, as it was written, its docstring)."""
    node = source_of(kind)
    assert isinstance(node, ast.ClassDef)
    for field, after in itertools.zip_longest(node.body, node.body[1:]):
        text = "" if after is None else text_in(after)
        if isinstance(field, ast.AnnAssign):
            yield ast.unparse(field.target), ast.unparse(field), text
        elif isinstance(field, ast.Assign):
            yield ast.unparse(field.targets[0]), ast.unparse(field), text


def text_in(node: ast.stmt) -> str:
    """Return the text of a statement that is nothing else; empty for any other one."""
    value = node.value if isinstance(node, ast.Expr) else None
    return str(value.value) if isinstance(value, ast.Constant) else ""


def of_class(kind: type) -> Iterator[str]:
    """Print a class: its words, how it is made, and what it does."""
    yield f"### {kind.__name__}\n\n{text_of(kind.__doc__)}\n"
    if issubclass(kind, enum.Enum):
        yield "".join(
            f"- `{kind.__name__}.{name}`: {text_of(doc)}\n" for name, _, doc in fields(kind)
        )
        return
    if dataclasses.is_dataclass(kind):
        yield call(kind.__name__, ", ".join(shown for _, shown, _ in fields(kind)), "")
        return
    properties = []
    for name, member in members(kind):
        if isinstance(member, property):
            node = source_of(member.fget)
            assert isinstance(node, ast.FunctionDef)
            doc = " ".join(text_of(member.__doc__).split())
            properties.append(f"| `{name}` | {annotation(node.returns)} | {doc} |\n")
        else:
            function = getattr(member, "__func__", member)
            yield (
                signature(function, f"{kind.__name__}.{name}") + f"\n{text_of(function.__doc__)}\n"
            )
    if properties:
        yield "| property | type | |\n|---|---|---|\n" + "".join(properties)


def page() -> str:
    """Return the whole page."""
    parts = [HEAD]
    for heading, things in SECTIONS.items():
        parts.append(f"## {heading}\n")
        if things is EXCEPTIONS:
            parts.append("".join(rows()))
            continue
        for thing in things:
            if inspect.isclass(thing):
                parts += of_class(thing)
            else:
                parts.append(f"### {thing.__name__}\n\n{signature(thing, thing.__name__)}")
                parts.append(f"{text_of(thing.__doc__)}\n")
    return "\n".join(parts)


def rows() -> Iterator[str]:
    """Print the exceptions, each below the one that it is a kind of."""
    yield "All of them are in `xvd.errors`, and `xvd` has the first and the last.\n\n"
    yield "| exception | is a | when |\n|---|---|---|\n"
    for kind in EXCEPTIONS:
        bases = ", ".join(f"`{base.__name__}`" for base in kind.__bases__)
        yield f"| `{kind.__name__}` | {bases} | {' '.join(text_of(kind.__doc__).split())} |\n"


def main(arguments: list[str]) -> int:
    fresh = page()
    if arguments == ["--write"]:
        PAGE.write_text(fresh)
        return 0
    if not PAGE.exists() or PAGE.read_text() != fresh:
        print("docs/api.md is stale: run tools/print_api.py --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
