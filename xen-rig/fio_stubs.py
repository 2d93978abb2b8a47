#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""fio_stubs.py ROOT DEST TRIPLET LOADER TOOLS: fio for an initramfs, without its heavy engines.

It is ROOT's, and goes to DEST. TRIPLET, as x86_64-linux-gnu, is the directory of its libraries,
LOADER the path of its dynamic linker, TOOLS what the names of compiler and nm begin with, or
nothing.

Debian's fio is linked to the client libraries of several storage clusters, 85 MB with all they
need. Each of these becomes a stub that has the symbols fio asks for and nothing in them, which is
all that the dynamic linker wants as long as nobody uses those engines.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

KEPT = re.compile(r"lib(c|m|z|aio|numa)\.so")


def output(*command: str | Path) -> str:
    """What a command prints; it must succeed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def wanted_symbols(tools: str, program: Path) -> set[str]:
    """The undefined symbols of a program, ``name`` or ``name@version``."""
    text = output(f"{tools}nm", "-D", "--undefined-only", program)
    return set(re.findall(r"^\s+U (\S+)$", text, re.MULTILINE))


def stub(tools: str, library: Path, wanted: set[str], made: Path) -> None:
    """A shared library `made` with those symbols of `library` that are wanted, by version."""
    plain = {symbol.split("@")[0] for symbol in wanted}
    text = output(f"{tools}nm", "-D", "--defined-only", library)
    versions: dict[str, set[str]] = {}
    for symbol, version in re.findall(r"^\S+ [TWDBRVi] ([^@\s]+)@?@?(\S*)$", text, re.MULTILINE):
        if symbol in plain and (not version or f"{symbol}@{version}" in wanted):
            versions.setdefault(version, set()).add(symbol)
    with tempfile.TemporaryDirectory() as scratch:
        source, script = Path(scratch, "stub.c"), Path(scratch, "stub.map")
        names = sorted(set().union(*versions.values()))
        source.write_text("".join(f"void {s}(void) {{ __builtin_trap(); }}\n" for s in names))
        blocks = [
            f"{version} {{ global: {'; '.join(sorted(symbols))}; }};\n"
            for version, symbols in versions.items()
            if version
        ]
        script.write_text("".join(blocks) or "{ global: *; };\n")
        output(
            f"{tools}gcc", "-shared", "-fPIC", "-nostdlib", "-w", "-s", "-o", made, source,
            f"-Wl,-soname,{made.name}", f"-Wl,--version-script={script}",
        )  # fmt: skip


def main() -> None:
    """Copy fio, the linker and the small libraries; stub the rest."""
    root, dest = Path(sys.argv[1]), Path(sys.argv[2])
    libraries, loader, tools = f"usr/lib/{sys.argv[3]}", sys.argv[4], sys.argv[5]

    def find(name: str) -> Path:
        return next((root / libraries).glob(name)).resolve()

    def copy(source: Path, path: str) -> None:
        (dest / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, dest / path)

    fio = root / "usr/bin/fio"
    copy(fio, "usr/bin/fio")
    copy((root / loader).resolve(), loader)
    wanted = wanted_symbols(tools, fio)
    needed = re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", fio))
    for name in needed:
        if KEPT.match(name):
            copy(find(name), f"{libraries}/{name}")
        elif not name.startswith("ld-linux"):
            stub(tools, find(name), wanted, dest / libraries / name)


if __name__ == "__main__":
    main()
