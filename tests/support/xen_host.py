# SPDX-License-Identifier: Apache-2.0
"""What the tests on real Xen use: the daemon as a process, disks by xl, figures of the process."""

import asyncio
import contextlib
import enum
import json
import os
import platform
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from xvd_process import as_by_the_unit

from xvd.cli.asking import ask

ON_ARM = platform.machine() == "aarch64"

REPORT = Path(os.environ.get("XVD_REPORT", "/tmp/xvd-report"))

COMPLAINTS = "dmesg -r | grep -E '^<[0-4]>' | grep -iE 'blkfront|vbd|xvd|bad grant|I/O error'"
"""Whatever a guest's kernel warns of that could be about its disks; empty when all is well."""

VERIFY = (
    "fio --name=v --filename=/dev/xvda --direct=1 --ioengine=libaio --iodepth=16 --rw=randrw"
    " --bsrange=512-128k --size=16m --verify=crc32c --verify_fatal=1"
)
"""Random writes of any size, each read back and its checksum compared."""


def sh(command: str) -> str:
    """Run a shell command that must succeed; what it says."""
    done = subprocess.run(
        command, shell=True, check=False, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


class Slot(enum.Enum):
    """The words of xl's disk line that make a disk ours."""

    VBD = "script=block-xvd"
    TAP = "backendtype=tap,script=block-xvd"

    def line(self, target: object, vdev: str = "xvda", access: str = "rw") -> str:
        """A disk's line for xl; the target takes the rest of it, so it comes last."""
        return f"format=raw,vdev={vdev},access={access},{self.value},target={target}"


class Kind(enum.Enum):
    """A guest's kind, by the words that make `domu` boot one."""

    PV = ("-t", "pv")
    PVH = ("-t", "pvh")
    PAGES_4K = ()
    PAGES_16K = ("-K", "16k")
    PAGES_64K = ("-K", "64k", "-m", "512")  # with half of that it may run out of memory
    PAGES_64K_LINUX_6_1 = ("-K", "64k-6.1", "-m", "512")


KINDS = list(Kind)[2:] if ON_ARM else list(Kind)[:2]
"""Those that this host can have. What xl calls PVH is the only kind of ARM, where Linux' pages may
be larger."""

each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.lower())
two_kinds = pytest.mark.parametrize(
    "kind", KINDS[::2] if ON_ARM else KINDS, ids=lambda kind: kind.name.lower()
)
"""For what takes minutes: on ARM the smallest pages and the largest."""


def backend_nodes() -> str:
    """Those of guests in dom0; dom0's own disks are another file's."""
    return sh("xenstore-ls -f /local/domain/0/backend | grep -E '/vbd3?/[1-9]' || true")


class GuestLost(AssertionError):
    """The software CPU has lost a PVH guest."""


def _lost(said: str) -> bool:
    """Whether a guest ended in one of the two ways in which the software CPU loses PVH guests.

    Either its kernel dies at the first instruction of the callback's handler, entered again with
    interrupts off, because QEMU's VMRUN (svm_helper.c; 7.2 and 10.0) leaves what Xen injects to be
    delivered once more. Or Xen reports a triple fault. It happens with any backend: to one guest in
    four with xen-blkback, and before there is a disk (docs/xen.md).
    """
    domids = re.findall(r"\(domid (\d+)\)", said)  # several, where one was started by its reboot
    faulted = any(f"d{domid}v0 Triple fault" in said for domid in domids)
    return faulted or "RIP: 0010:asm_sysvec_xen_hvm_callback+0x0/" in said


def domu(*words: str) -> str:
    """Boot a guest, run its script, and demand that it succeeds; what its console said.

    Raises `GuestLost` if it did not because the software CPU has lost it.
    """
    done = subprocess.run(
        ["domu", *words], check=False, capture_output=True, text=True, timeout=900
    )
    text = f"{done.returncode}\n{done.stdout[-8000:]}{done.stderr}"
    if done.returncode and _lost(done.stdout):
        raise GuestLost(text)
    assert done.returncode == 0, text
    return done.stdout


def whatever_is_lost(boot: Callable[[], str], tries: int = 4) -> str:
    """Boot a guest, from the beginning and with a new disk, until the software CPU keeps it."""
    for _ in range(tries - 1):
        with contextlib.suppress(GuestLost):
            return boot()
        note("The software CPU has lost a PVH guest, which is started again.")
    return boot()


def typed(guest: str, command: str) -> str:
    """Type a command into the shell of a running guest; it must succeed; what it says."""
    done = subprocess.run(
        ["domu", "-e", guest, command], check=False, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def counter(domid: int, name: str, vdev: str = "xvda") -> int:
    """What the daemon in dom0 has counted of a guest's disk, by blkback's name for it."""
    daemons = json.loads(sh("xvd stats --json")).values()
    [found] = [disk for disks in daemons for disk in disks if disk["disk"] == f"{domid}/{vdev}"]
    return int(found["counters"][name])


_PRIVATE = {"backend", "frontend", "params", "script", "physical-device-path", "physical-device"}
"""Where things are: of no interest in a table."""


def negotiated(domid: int, vdev: int = 51712) -> dict[str, tuple[str, str]]:
    """What both ends have published of a disk: {node: (frontend's, backend's)}, without paths."""
    front = f"/local/domain/{domid}/device/vbd/{vdev}"
    back = sh(f"xenstore-read {front}/backend").strip()
    sides = []
    for path in (front, back):
        lines = (line.partition(" = ") for line in sh(f"xenstore-ls -f {path}").splitlines())
        sides.append({name.removeprefix(f"{path}/"): value.strip('"') for name, _, value in lines})
    names = sorted((sides[0].keys() | sides[1].keys()) - _PRIVATE)
    return {name: (sides[0].get(name, ""), sides[1].get(name, "")) for name in names}


def note(text: str) -> None:
    """Add something to the report that the rig shows at its end."""
    with REPORT.open("a") as file:
        file.write(f"{text}\n\n")


def report(title: str, rows: dict[str, tuple[str, str]]) -> None:
    """Add a table to it."""
    lines = [f"{title}\n  {'node':<30} {'frontend':<12} backend"]
    lines += [f"  {name:<30} {front:<12} {back}" for name, (front, back) in rows.items()]
    note("\n".join(lines))


class Backend:
    """``xvd backend``, restarted at will, with the powers of root's that its unit has. program:
    another than the rig's."""

    def __init__(self, directory: Path, program: str = "xvd") -> None:
        self._program = program
        self._log = directory / "log"
        self._out = directory / "out"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, *options: str) -> None:
        with self._log.open("ab") as log, self._out.open("wb") as out:
            command = [*as_by_the_unit(), self._program, "backend", "-vv", *options]
            self._process = subprocess.Popen(command, stdout=out, stderr=log)
        end = time.monotonic() + 60
        while self._out.read_bytes() != b"ready\n":
            assert self._process.poll() is None, self.log()
            assert time.monotonic() < end, self.log()
            time.sleep(0.05)

    def stop(self) -> int:
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(60)

    def kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(60)

    def log(self) -> str:
        return self._log.read_text()

    def processes(self) -> list[int]:
        """Itself, the process that forks workers, and those."""
        found = [self.pid]
        for pid in found:
            for task in list(Path(f"/proc/{pid}/task").glob("*")):
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    found += map(int, (task / "children").read_text().split())
        return found

    def _of_each(self, look: Callable[[Path], int]) -> int:
        """What there is in all of them, but for those that end meanwhile."""
        total = 0
        for pid in self.processes():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                total += look(Path(f"/proc/{pid}"))
        return total

    def threads(self) -> int:
        """Those of disks and the event loop's helpers, of which there are more the more it does."""
        return self._of_each(lambda proc: len(os.listdir(proc / "task")))

    def resident(self) -> int:
        """The processes' own memory, bytes."""

        def own(proc: Path) -> int:
            pages = (proc / "statm").read_text().split()
            return (int(pages[1]) - int(pages[2])) * 4096

        return self._of_each(own)

    def held(self) -> dict[str, int]:
        """What they hold on behalf of disks: descriptors (ports among them), grants."""
        return {
            "descriptors": self._of_each(lambda proc: len(os.listdir(proc / "fd"))),
            "grant mappings": self._of_each(
                lambda proc: (proc / "maps").read_text().count("/dev/xen/gntdev")
            ),
        }

    async def _workers(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = await ask(Path("/run/xvd/control/backend-0"), "workers")
        return found

    def worker(self, domid: int) -> dict[str, Any]:
        """What the supervisor tells of a guest's process."""
        [found] = [one for one in asyncio.run(self._workers()) if domid in one["domains"]]
        return found


class Disk:
    """A disk that xl attaches to dom0 itself: the shortest way from a kernel to our backend."""

    device = Path("/dev/xvda")

    def __init__(self, image: Path, slot: Slot, access: str = "rw", uri: str = "") -> None:
        self.image = image
        self.line = slot.line(uri or image, access=access)

    def attach(self) -> None:
        try:
            sh(f"xl block-attach 0 '{self.line}'")
        except AssertionError:
            # Its nodes stay where libxl gives up, and would be in the way of all that comes after.
            subprocess.run(["xl", "block-detach", "--force", "0", "xvda"], check=False)
            raise
        end = time.monotonic() + 30
        while not self.device.is_block_device():
            assert time.monotonic() < end, sh("xenstore-ls -f /local/domain/0")
            time.sleep(0.05)

    def detach(self) -> None:
        sh("xl block-detach 0 xvda")
        nodes = "xenstore-ls -f /local/domain/0 | grep -E"
        left = sh(f"{nodes} '/(backend|device)/vbd|/error/' || true")
        assert left == "", left
