# SPDX-License-Identifier: Apache-2.0
"""The C header says what link.py and shared.pxd do, and a driver that is made of it works."""

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from xvd_process import Daemon, run_xvd

from xvd.machine.emulated import link
from xvd.machine.emulated.host import Host, Session
from xvd.types import PAGE_SIZE, Domid

ROOT = Path(__file__).parents[2]
HEADER = ROOT / "contrib" / "c" / "xvd_machine.h"
SHARED = ROOT / "src" / "xvd" / "machine" / "emulated"
WARNINGS = ("-Wall", "-Wextra", "-Werror")

PRINTER = """\
#include "xvd_machine.h"
#define ROW(name, arguments, result, fds, help) \\
    printf("%s|%s|%s|%s|%s\\n", #name, arguments, result, fds, help);
int main(void)
{
    XVD_LINK_CALLS(ROW)
    return 0;
}
"""
FUNCTIONS = {
    "open": "protocol, domid", "xenstore": "", "create_domain": "domid", "restrict": "domids",
}  # fmt: skip
"""The calls that are no methods of the session or the host, and what they take."""
ANSWERS = {
    link._NOTHING: ("null", 0), link._NUMBERS: ("{name: count}", 0), link._CHANNEL: ("port", 2),
    link._PAGES: ("[frame, [gref, ...]]", 0), link._SOCKET: ("null", 1),
    link._STATE: ("[pages, grefs, tracks, ports]", 2),
}  # fmt: skip
"""How an outcome travels: its form in the header, and how many descriptors go with it."""


def run(command: Sequence[str | Path]) -> tuple[int, str, str]:
    """The status and what is said on the two outputs."""
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    return result.returncode, result.stdout, result.stderr


def build(compiler: str, directory: Path, source: Path, *, standard: str = "gnu11") -> Path:
    program = directory / source.stem
    command = [compiler, f"-std={standard}", *WARNINGS, "-O2", f"-I{HEADER.parent}", str(source)]
    assert run([*command, "-o", str(program)]) == (0, "", "")
    return program


@pytest.fixture
def rows(tmp_path: Path, requires_tool: Callable[[str], str]) -> dict[str, tuple[str, str, int]]:
    """Each call that the header has: (its arguments, its result, its descriptors)."""
    source = tmp_path / "printer.c"
    source.write_text(PRINTER)
    printer = build(requires_tool("gcc"), tmp_path, source)
    lines = subprocess.run([printer], check=True, capture_output=True, text=True).stdout
    cells = [line.split("|") for line in lines.splitlines()]
    assert all(len(row) == 5 and row[4] for row in cells)
    return {
        name: (arguments, result, len(fds.split(",")) if fds else 0)
        for name, arguments, result, fds, _ in cells
    }


def arguments_of(call: str) -> str:
    """What a call takes at the host's side."""
    if call in FUNCTIONS:
        return FUNCTIONS[call]
    method = getattr(Session, call, None) or getattr(Host, call)
    return ", ".join(name for name in inspect.signature(method).parameters if name != "self")


@pytest.mark.slow
def test_the_calls_are_those_of_the_link(rows: dict[str, tuple[str, str, int]]) -> None:
    theirs = {name: (arguments_of(name), *ANSWERS[call._way]) for name, call in link._CALLS.items()}

    assert rows == {"open": (arguments_of("open"), "session", 0), **theirs}


def test_the_numbers_are_those_of_the_link_and_of_the_machine() -> None:
    defined = re.findall(r"^#define (XVD_\w+) ([\d *()]+)u?\s*$", HEADER.read_text(), re.M)
    text = (SHARED / "shared.pxd").read_text() + (SHARED / "shared.pyx").read_text()
    own = {name: int(value) for name, value in re.findall(r"^    ([A-Z_]+) = (\d+)", text, re.M)}
    ours = {name: eval(value) for name, value in defined}  # a number, or two and a sign

    assert ours == {
        "XVD_LINK_PROTOCOL": link._PROTOCOL, "XVD_LINK_PACKET_MAX": link._PACKET_MAX,
        "XVD_LINK_FDS_MAX": link._FDS_MAX, "XVD_PAGE_SIZE": PAGE_SIZE,
        "XVD_GTF_PERMIT_ACCESS": own["GTF_PERMIT_ACCESS"], "XVD_GTF_READONLY": own["GTF_READONLY"],
        "XVD_GTF_READING": own["GTF_READING"], "XVD_GTF_WRITING": own["GTF_WRITING"],
        "XVD_HEAP_HEADER": own["HEADER_BYTES"], "XVD_HEAP_ACTIVE": own["ACTIVE_BYTES"],
        "XVD_HEAP_TRACK": own["TRACK_BYTES"], "XVD_PORT_INTERDOMAIN": own["PORT_INTERDOMAIN"],
    }  # fmt: skip


@pytest.mark.parametrize("struct", ["grant_entry", "port_slot"])
def test_the_structures_are_those_of_the_machine(struct: str) -> None:
    [theirs] = re.findall(
        rf"cdef struct {struct}:.*\n((?:    .*\n)+)", (SHARED / "shared.pxd").read_text()
    )
    [ours] = re.findall(rf"struct xvd_{struct} \{{\n(.*?)\n\}};", HEADER.read_text(), re.S)

    assert re.findall(r"^    (\w+ \w+(?:\[\d\])?);", ours, re.M) == re.findall(
        r"^    (\w+ \w+(?:\[\d\])?)", theirs, re.M
    )


@pytest.mark.parametrize("path", [HEADER, ROOT / "examples" / "blkfront.c"], ids=lambda it: it.name)
def test_lines_of_c_are_short_enough(path: Path) -> None:
    assert [line for line in path.read_text().splitlines() if len(line) > 100] == []


# ---- The driver ----


@pytest.fixture
def blkfront(tmp_path: Path, requires_tool: Callable[[str], str]) -> Path:
    requires_tool("/usr/include/xen/io/blkif.h")
    return build(requires_tool("gcc"), tmp_path, ROOT / "examples" / "blkfront.c")


@pytest.mark.slow
def test_a_driver_in_c_uses_a_disk_and_gives_it_back(tmp_path: Path, blkfront: Path) -> None:
    image, host = tmp_path / "disk.img", tmp_path / "host"
    image.write_bytes(bytes(1 << 20))
    with Daemon("host", str(host)), Daemon("backend", "--host", str(host)):
        attached = run_xvd("attach", "--host", str(host), "1", f"vdev=xvda,target={image}")
        assert attached.returncode == 0, attached.stderr

        said = [run([blkfront, host, "1", "xvda"]) for _ in range(2)]

        [row] = json.loads(run_xvd("list", "--host", str(host), "--json").stdout)
        detached = run_xvd("detach", "--host", str(host), "1", "xvda")
        session = link.LinkClient(host / "machine", Domid(0))
        taken = session.accounting()
        session.close()
    assert said == [(0, "2048 sectors; 8 of them written, read and compared\n", "")] * 2
    assert (row["frontend_state"], row["backend_state"]) == ("closed", "closed")
    assert (detached.returncode, detached.stderr) == (0, "")
    assert {**taken, "sessions": 0} == dict.fromkeys(taken, 0)
    written = bytes((i * 7 + i // 256) % 256 for i in range(4096))
    assert image.read_bytes() == bytes(32768) + written + bytes((1 << 20) - 32768 - 4096)


@pytest.mark.slow
def test_a_driver_in_c_is_told_what_is_wrong(tmp_path: Path, blkfront: Path) -> None:
    host = tmp_path / "host"
    with Daemon("host", str(host)):
        commands = (("none", "1", "xvda"), (host, "7", "xvda"), (host, "0", "xvda"))

        said = [run([blkfront, *words]) for words in commands]

    assert said == [
        (1, "", "blkfront: none: none/machine: No such file or directory\n"),
        (1, "", f"blkfront: {host}: there is no domain 7 on this machine\n"),
        (1, "", "blkfront: device/vbd/51712: there is no such disk\n"),
    ]


@pytest.mark.slow
def test_a_driver_in_c_believes_no_lie(blkfront: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "lying_backend.py"), str(blkfront)]

    status, lines, _ = run(command)

    assert (status, {line[30:] for line in lines.splitlines()}) == (0, {"well"})
