# SPDX-License-Identifier: Apache-2.0
"""What every source file obeys: who imports whom, how long it may be, and how it begins."""

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "xvd"
PYTHON = sorted(PACKAGE.rglob("*.py")) + sorted(PACKAGE.rglob("*.pyi"))
CYTHON = sorted(PACKAGE.rglob("*.pyx")) + sorted(PACKAGE.rglob("*.pxd"))
OTHERS = [
    path
    for folder in ("tests", "tools", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
EVERY = PYTHON + CYTHON + OTHERS

FOR_ALL = ("errors", "files", "loglimit", "packages", "sockets", "types")
ENDS = ("xenbus", "blkif", "dataplane", "machine.interface", "machine.xs", "engines.interface")
TABLES = tuple(
    f"dataplane.{name}" for name in ("abi", "c", "latency", "liburing", "ports", "types")
)
"""What lies in no room of the data plane."""
ABOVE = ("backend", "frontend", "engines", "xenbus", "machine", "blkif", "dataplane")
ARROWS: dict[str, tuple[str, ...]] = {
    "__init__": ("disks", "embed", "engines"),  # the names that `import xvd` gives
    "joining": ("machine", "blkif"),
    "disks": ("joining", "frontend", "blkif"),
    "embed": ("disks", *ABOVE, "toolstack"),
    "testing": ("machine", "blkif", "toolstack", "xenbus"),
    "cli": (
        *("joining", "embed", "backend", "frontend", "export", "sim", "bench", "service"),
        *("engines", "xenbus", "machine", "blkif", "toolstack"),
    ),
    "bench": (*ABOVE, "toolstack"),
    "sim": (*ABOVE, "toolstack"),
    "service": (*ABOVE, "export", "toolstack"),
    # The compiled transmission fills a table, as a fast engine does, for its disk's queues.
    "export": ("frontend", "dataplane.ports", "dataplane.abi", "dataplane.c"),
    "backend": (*ENDS, "engines.live"),
    "frontend": ENDS,
    "toolstack": ("blkif", "engines", "machine.xs"),
    "engines": ("blkif.assignment", *TABLES),
    "xenbus": ("blkif", "dataplane", "machine.interface", "machine.xs"),
    "machine.emulated": ("machine.interface", "machine.pages", "machine.xs", *TABLES),
    "machine.xen": ("machine.interface", "machine.pages", "machine.xs", *TABLES),
    "machine.xs": ("machine.xs",),
    "machine": ("machine.xs",),  # interface.py names the store's client for the type checker
    "dataplane.ring": TABLES,
    "dataplane.back": (*TABLES, "dataplane.ring"),
    "dataplane.front": (*TABLES, "dataplane.ring"),
    "dataplane.loop": TABLES,  # what it steps fills a table of ports.pxd
    "dataplane": (),
    "blkif": (),
}
"""Package, or file of the top level: what it may import of xvd besides itself and `FOR_ALL`."""

FILE_LINES_MAX, FUNCTION_LINES_MAX, COLUMNS_MAX = 600, 60, 100


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def package_of(path: Path) -> str:
    """The longest name in `ARROWS` that the file is or lies in; empty for what all may import."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in ARROWS:
            return ".".join(parts[:length])
    return ""


def imported(path: Path) -> set[str]:
    """Modules of xvd that a file imports or cimports, without the leading ``xvd.``."""
    text = path.read_text()
    if path.suffix in (".pyx", ".pxd"):
        found = re.findall(r"^\s*(?:from|c?import) xvd\.([a-z_.]+)", text, re.MULTILINE)
        return set(found)
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)][:1]
            if node.module == "xvd":
                found += [f"xvd.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return {name.removeprefix("xvd.") for name in found if re.match(r"xvd\.[a-z]", name)}


def lies_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@pytest.mark.parametrize("path", PYTHON + CYTHON, ids=name_of)
def test_imports_follow_the_arrows(path: Path) -> None:
    package = package_of(path)
    allowed = (*FOR_ALL, *ARROWS.get(package, ()), *([package] if package else []))
    wrong = [m for m in imported(path) if not any(lies_in(m, a) for a in allowed)]
    assert wrong == []


def module_of(path: Path) -> str:
    """A file's name as an import has it; what a .pxd declares is a module of its own."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return f"{name}.pxd" if path.suffix == ".pxd" else name


def import_graph() -> dict[str, set[str]]:
    """Module: those of xvd that it imports, be it in a function or for the type checker alone."""
    files = {module_of(path): [] for path in PYTHON + CYTHON}
    for path in PYTHON + CYTHON:
        files[module_of(path)].append(path)
    graph: dict[str, set[str]] = {}
    for module, paths in files.items():
        wanted: set[str] = set()
        for path in paths:
            text = path.read_text()
            if path.suffix in (".pyx", ".pxd"):
                lines = re.findall(r"^\s*from xvd\.([\w.]+) (c?)import", text, re.MULTILINE)
                wanted |= {f"{name}.pxd" if compiled else name for name, compiled in lines}
            else:
                wanted |= names_imported(text)
        if f"{module}.pxd" in files:
            wanted.add(f"{module}.pxd")
        graph[module] = (wanted & files.keys()) - {module}
    return graph


def names_imported(text: str) -> set[str]:
    """What a Python file imports of xvd: packages, and each name as the module it may be."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "xvd":
            base = (node.module or "").removeprefix("xvd").lstrip(".")
            found |= {base, *(f"{base}.{alias.name}".lstrip(".") for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("xvd.") for alias in node.names}
    return found - {""}


def test_no_modules_import_each_other_in_a_circle() -> None:
    """A circle cannot be read from its beginning, nor one part of it be tried without the rest."""
    graph = import_graph()
    assert "dataplane.ports.pxd" in graph["engines.memory"]
    while ends := [module for module, imports in graph.items() if not imports & graph.keys()]:
        for module in ends:
            del graph[module]
    assert {module: sorted(imports & graph.keys()) for module, imports in graph.items()} == {}


def test_only_the_list_names_engines_and_layers() -> None:
    """Another one is its own file and a word in `engines/uri.py`."""
    graph = import_graph()
    layers = {m for m in graph if m.startswith("engines.layers.")} - {"engines.layers.base"}
    named = {"engines.image", "engines.null", *layers}
    importers = {module: {m for m, found in graph.items() if module in found} for module in named}
    assert {"engines.image", "engines.layers.delay"} <= importers.keys()
    listed = {module: {"engines.uri"} for module in named}
    listed["engines.image"].add("engines.layers.cow")  # which keeps what is written in one
    listed["engines.layers.zeroes"].add("engines.image")  # a file has it as an option, too
    assert importers == listed


@pytest.mark.parametrize("path", EVERY, ids=name_of)
def test_a_file_is_short_enough_and_begins_with_its_licence(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= FILE_LINES_MAX
    if path.suffix != ".pyi":
        assert lines[0] == "# SPDX-License-Identifier: Apache-2.0"
        assert sum("SPDX-License-" + "Identifier" in line for line in lines[1:3]) == 0


@pytest.mark.parametrize("path", CYTHON, ids=name_of)
def test_lines_of_cython_are_short_enough(path: Path) -> None:
    """ruff sees to those of Python."""
    wide = [line for line in path.read_text().splitlines() if len(line) > COLUMNS_MAX]
    assert wide == []


@pytest.mark.parametrize("path", EVERY, ids=name_of)
def test_notes_to_be_done_have_a_number(path: Path) -> None:
    notes = re.compile(r"#.*\b(TO" r"DO|FIX" r"ME|XX" r"X)\b(?!\(#\d+\))")
    assert [line for line in path.read_text().splitlines() if notes.search(line)] == []


def python_functions(path: Path) -> list[tuple[str, int]]:
    return [
        (node.name, (node.end_lineno or node.lineno) - node.lineno + 1)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def cython_functions(path: Path) -> list[tuple[str, int]]:
    """By indentation: from a def to the last line that is deeper than it."""
    found: list[tuple[str, int]] = []
    lines = path.read_text().splitlines()
    head = re.compile(r"(\s*)(?:cdef|cpdef|def)\b[^=]*?(\w+)\(")
    for start, line in enumerate(lines):
        match = head.match(line)
        if match is None:
            continue
        end = start
        for number in range(start + 1, len(lines)):
            text = lines[number]
            if text.strip() and len(text) - len(text.lstrip()) <= len(match[1]):
                break
            if text.strip():
                end = number
        found.append((match[2], end - start + 1))
    return found


HEADERS = [path for path in CYTHON if path.suffix == ".pxd"]


def bodies(path: Path) -> list[str]:
    """The first lines of the functions that a .pxd does not only declare."""
    found: list[str] = []
    head = ""
    for line in path.read_text().splitlines():
        if head or re.match(r"cdef (?!class|struct|enum|union|extern|packed).*\(", line):
            head += line
            if head.count("(") == head.count(")"):
                found += [head] if head.rstrip().endswith(":") else []
                head = ""
    return found


def inline_header(path: Path) -> list[str]:
    """The room whose inline header a .pxd says it is, and those that it is for besides."""
    second = path.read_text().splitlines()[1]
    match = re.fullmatch(r"# Inline header of (\S+)/(?:, for (\S+)/(?: and (\S+)/)?)?\.", second)
    return [room for room in match.groups() if room] if match else []


@pytest.mark.parametrize("path", HEADERS, ids=name_of)
def test_a_pxd_has_bodies_only_where_it_says_that_it_is_an_inline_header(path: Path) -> None:
    """A call into another extension goes through a pointer: what a request passes is inlined."""
    assert bool(bodies(path)) == bool(inline_header(path))


def test_an_inline_header_belongs_to_one_room() -> None:
    """Its own folder; whoever includes it from elsewhere is named in it."""
    for path in HEADERS:
        rooms = [PACKAGE / room for room in inline_header(path)]
        assert not rooms or rooms[0] == path.parent
        name = module_of(path).removesuffix(".pxd")
        users = {
            user.parent
            for user in CYTHON
            if re.search(rf"^from xvd\.{name} cimport", user.read_text(), re.M)
        }
        assert not rooms or users <= set(rooms), name_of(path)


@pytest.mark.parametrize("path", EVERY, ids=name_of)
def test_functions_are_short_enough(path: Path) -> None:
    functions = cython_functions(path) if path in CYTHON else python_functions(path)
    assert [f for f in functions if f[1] > FUNCTION_LINES_MAX] == []


@pytest.mark.parametrize(
    "path", [p for p in PYTHON + CYTHON if p.suffix in (".py", ".pyx")], ids=name_of
)
def test_every_source_is_built_and_installed(path: Path) -> None:
    """A file that meson does not know is missing from the wheel, and only there."""
    folder = path.parent
    while not (folder / "meson.build").exists():
        folder = folder.parent
    text = (folder / "meson.build").read_text()
    name = path.stem if path.suffix == ".pyx" else path.name
    assert re.search(rf"'[^']*\b{re.escape(name)}[^']*'", text), f"{name} is not in {folder}"


def test_the_generated_header_is_fresh() -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "tools" / "gen_abi.py", "--check"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def declared(path: Path) -> set[str]:
    """The functions and fields that a .pxd declares; not what C declares, and no padding."""
    found: list[str] = []
    struct = False
    for line in path.read_text().splitlines():
        code = line.partition("#")[0].rstrip()
        if code and not code.startswith(" "):
            struct = code.startswith("cdef struct")
            if re.match(r"cdef (?!struct|enum|extern|class)", code):
                found += re.findall(r"(\w+)\(", code)[:1]
        elif struct and "(" not in code:
            found += re.findall(r"(\w+)(?:\[[\w, ]+\])*\s*(?:,|$)", code)
    return {name for name in found if not re.fullmatch(r"pad\d*", name)}


def test_nothing_that_is_declared_stays_unused() -> None:
    """No function and no field of a structure outlives its last use."""
    every = "\n".join(re.sub(r"#.*", "", path.read_text()) for path in CYTHON)
    uses = Counter(re.findall(r"\w+", every))
    names = set().union(*(declared(path) for path in CYTHON if path.suffix == ".pxd"))
    assert {"hash_of", "users", "gref", "take_space"} <= names
    assert sorted(name for name in names if uses[name] < 2) == []


def module_names(path: Path) -> set[str]:
    """The functions, classes and constants that a Python file defines at its top level."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if not node.decorator_list:  # a decorator may keep it: a verb of the command line
                found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in found if not name.startswith("__")}


def test_no_name_of_a_module_stays_unused() -> None:
    """A name that nothing mentions but its definition and `__all__` is dead."""
    texts = [path.read_text() for path in EVERY]
    texts += [path.read_text() for path in sorted((ROOT / "examples").iterdir()) if path.is_file()]
    uses = Counter(re.findall(r"(?<![\w\"])\w+(?!\w)", "\n".join(texts)))
    sources = [path for path in PYTHON if path.suffix == ".py"]
    names = {name: path for path in sources for name in module_names(path)}
    assert {"parse_offer", "DOMID_SELF", "XenstoreClient"} <= names.keys()
    assert (
        sorted(f"{name_of(path)}: {name}" for name, path in names.items() if uses[name] < 2) == []
    )


FACTS = {512: "types.RING_SECTOR_SIZE", 0x7FF0: "types.DOMID_FIRST_RESERVED", 0x7FEF: "the same"}
"""Numbers that mean one thing in this project, wherever they stand, and where they are defined."""

NAMED_FACTS = {11: "abi.MAX_SEGMENTS_PER_REQUEST", 4096: "types.PAGE_SIZE"}
"""Numbers that may mean another thing too: then they have a name of their own."""


def retyped(path: Path) -> list[str]:
    """The numbers of `FACTS` in a file, and those of `NAMED_FACTS` that define no name."""
    tree = ast.parse(path.read_text())
    keywords = (node for node in ast.walk(tree) if isinstance(node, ast.keyword))
    named: set[ast.AST] = {node for node in keywords if isinstance(node.value, ast.Constant)}
    for body in [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]:
        for node in body.body:
            simple = isinstance(body, ast.ClassDef) or not isinstance(
                getattr(node, "value", None), ast.Dict | ast.Tuple | ast.List | ast.Set | ast.Call
            )
            if isinstance(node, ast.Assign | ast.AnnAssign) and simple:
                named.add(node)
    within = {child for node in named for child in ast.walk(node)}
    numbers = [
        (node.lineno, node.value, node in within)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and type(node.value) is int
    ]
    facts = [(line, FACTS[value]) for line, value, _ in numbers if value in FACTS]
    facts += [(line, NAMED_FACTS[value]) for line, value, has in numbers
              if value in NAMED_FACTS and not has]  # fmt: skip
    return [f"line {line}: {fact}" for line, fact in sorted(facts)]


SPEAKERS = [
    path
    for path in PYTHON
    if path.suffix == ".py"
    and path != PACKAGE / "types.py"
    and PACKAGE / "bench" not in path.parents
]
"""Every source but where the facts stand, and the experiments, whose numbers are their own."""


@pytest.mark.parametrize("path", SPEAKERS, ids=name_of)
def test_no_fact_of_the_wire_is_written_again(path: Path) -> None:
    assert retyped(path) == []


@pytest.mark.parametrize("path", SPEAKERS, ids=name_of)
def test_only_the_protocol_and_the_toolstack_name_nodes(path: Path) -> None:
    """A node's name stands in the table; whoever else writes it may write another one."""
    if package_of(path) in ("blkif", "toolstack"):
        return
    names = set(re.findall(r'_(?:back|front)end\(\s*"([a-z]+-[a-z-]+)"', NODES_TABLE))
    assert {"feature-persistent", "sector-size", "ring-page-order"} <= names
    strings = {node.value for node in ast.walk(ast.parse(path.read_text()))
               if isinstance(node, ast.Constant)}  # fmt: skip
    assert sorted(names & strings - {"ring-ref"}) == []  # also how ring-ref0 and on begin


NODES_TABLE = (PACKAGE / "blkif" / "nodes.py").read_text()


OUR_OWN_WORDS = {
    "rooms": "modules",
    "books": "accounting",
    "stake": "connection, session",
    "uring": "loop",
    "logical_sectors": "block_sectors",
}
"""Words that this project alone used, and the field's words for the same things."""


WITH_WORDS = [
    path
    for path in (*EVERY, *sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")))
    if path != Path(__file__) and path.name != "CHANGELOG.md"
]
"""Every source and page, but this list, and the page that tells what was."""


@pytest.mark.parametrize("path", WITH_WORDS, ids=name_of)
def test_the_words_are_those_of_the_field(path: Path) -> None:
    words = set(re.findall(r"\w+", path.read_text()))
    assert sorted(words & OUR_OWN_WORDS.keys()) == []


RIDDLE = re.compile(
    r"(What|Who|Whom|Whose|Whoever|Whatever|Nobody|Somebody|Something|Those|Until|From now)\b"
    r"|(There will|The same|As [`A-Z])"
)


def docstrings(path: Path) -> list[str]:
    """The beginnings of the docstrings of a file's functions."""
    text = path.read_text()
    if path in CYTHON:
        head = r'^\s*(?:cdef|cpdef|def) (?!class|struct|enum|extern)[^"]*?:\n\s+"""([^\n]*)'
        return re.findall(head, text, re.MULTILINE)
    functions = (
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return [ast.get_docstring(node) or "" for node in functions]


WITH_PROSE = [
    path
    for path in PYTHON + CYTHON
    if path.suffix == ".py" or PACKAGE / "dataplane" not in path.parents
]


@pytest.mark.parametrize("path", WITH_PROSE, ids=name_of)
def test_the_docstring_of_a_function_says_what_it_does(path: Path) -> None:
    """It begins with a verb or a noun: "Return the requests without a response"."""
    assert [text for text in docstrings(path) if RIDDLE.match(text)] == []


def walks() -> dict[str, list[str]]:
    """Of each walk of docs/architecture.md, the files in order."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    found = re.findall(r"^### (An? .*)\n((?:(?!#).*\n)+)", text, re.MULTILINE)
    return {name: re.findall(r"^    (\S+\.p\w+)", body, re.MULTILINE) for name, body in found}


def test_every_file_of_a_walk_is_there() -> None:
    paths = [path.replace("...", "*") for walk in walks().values() for path in walk]
    assert len(paths) > 50
    assert [path for path in paths if not list(PACKAGE.glob(path))] == []


def test_a_write_enters_sixteen_files_at_most() -> None:
    assert len(set(walks()["A write"])) <= 16


def test_counters_are_unsigned() -> None:
    """A figure that only grows never shows as a negative one."""
    text = (PACKAGE / "dataplane" / "back" / "pending.pxd").read_text()
    [body] = re.findall(r"cdef struct queue_counters:\n((?:    .*\n)+)", text)
    assert {line.split()[0] for line in body.splitlines()} == {"uint64_t"}


HOST_PAGE = re.compile(r"getpagesize|PAGESIZE|_SC_PAGE|ALLOCATIONGRANULARITY|\bPAGE_SHIFT\b")


@pytest.mark.parametrize("package", ["blkif", "backend", "frontend", "dataplane"])
def test_rings_and_descriptors_do_not_ask_for_the_hosts_page_size(package: str) -> None:
    """They are counted in 4 KiB on a host of any page size (Linux 67de5dfb)."""
    sources = [path for path in PYTHON + CYTHON if PACKAGE / package in path.parents]
    assert sources
    assert [name_of(path) for path in sources if HOST_PAGE.search(path.read_text())] == []


COMPILED = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in CYTHON
    if path.suffix == ".pyx"
]


@pytest.mark.slow
def test_stubs_say_what_the_compiled_modules_are() -> None:
    allowed = ROOT / "tools" / "stubtest_allowlist.txt"
    result = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "--concise", "--allowlist", allowed, *COMPILED],
        check=False, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"MYPYPATH": "src"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
