# SPDX-License-Identifier: Apache-2.0
"""A host and its backend as processes of their own, as an administrator has them."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from xvd.machine.emulated.link import LinkClient
from xvd.machine.emulated.service import connect
from xvd.toolstack.vbd import attach, create_guest
from xvd.toolstack.xldisk import parse_xl_disk
from xvd.types import DOM0, Domid


class Daemons:
    """Made by `daemons`. directory: for images; host: what they meet in; options: the backend's."""

    def __init__(self, directory: Path, options: tuple[str, ...]) -> None:
        self.directory = directory
        self.host = directory / "host"
        self.options = options
        self._words = ("backend", "--host", str(self.host), *options)
        self._host = _start("host", str(self.host))
        self._backend = _start(*self._words)

    def image(self, name: str, size: int) -> Path:
        """Make an image of so many bytes."""
        path = self.directory / name
        path.touch()
        os.truncate(path, size)
        return path

    async def attach(self, guest: Domid, target: object) -> str:
        """Give a new guest a disk; its directory in the guest's xenstore."""
        dom0 = connect(self.host, DOM0)
        async with await dom0.xenstore() as store:
            assert isinstance(dom0.calls, LinkClient)
            dom0.calls.create_domain(guest)
            await create_guest(store, guest, f"guest{guest}")
            vbd = await attach(store, guest, parse_xl_disk(f"vdev=xvda,target={target}"))
        dom0.close()
        return f"device/vbd/{vbd.vdev}"

    def worker(self, guest: Domid) -> int | None:
        """Ask the supervisor for a guest's process; None if there is none just now."""
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(str(self.host / f"control/backend-{DOM0}"))
            control.sendall(b'{"method": "workers", "id": 1}\n')
            with control.makefile("rb") as answer:
                found = msgspec.json.decode(answer.readline())["result"]
        return next((each["pid"] for each in found if guest in each["domains"]), None)

    def start_anew(self) -> None:
        """Kill the backend, and start another, as a service manager does."""
        self._backend.kill()
        self._backend.wait()
        self._backend = _start(*self._words, wait=False)

    def processes(self) -> list[int]:
        """The backend, and all that it has started."""
        found = [self._backend.pid]
        for pid in found:
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    found += map(int, (task / "children").read_text().split())
        return found

    def cpu_s(self) -> float:
        """CPU time of the backend's processes (clock_getcpuclockid(3))."""
        return sum(time.clock_gettime_ns(~pid << 3 | 2) for pid in self.processes()) / 1e9

    def memory(self) -> int:
        """Bytes of memory that there would be without the backend's processes: what they share
        counts once (proc(5), Pss)."""
        total = 0
        for pid in self.processes():
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) << 10
        return total

    def close(self) -> None:
        """End both."""
        for process in (self._backend, self._host):
            process.terminate()
            process.wait()


@contextlib.contextmanager
def daemons(*options: str, place: Path) -> Iterator[Daemons]:
    """Have a host, and a backend with these options, in a directory of their own in `place`."""
    with tempfile.TemporaryDirectory(prefix="xvd-", dir=place) as directory:
        both = Daemons(Path(directory), options)
        try:
            yield both
        finally:
            both.close()


def _start(*words: str, wait: bool = True) -> "subprocess.Popen[bytes]":
    """Start a daemon; return when it says that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "xvd.cli", *words],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    if wait:
        process.stdout.readline()
    return process
