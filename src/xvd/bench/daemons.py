# SPDX-License-Identifier: Apache-2.0
"""A host and its backend as processes of their own, as an administrator has them."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from xvd.machine.emulated.link import LinkClient
from xvd.machine.emulated.service import connect
from xvd.toolstack.vbd import attach, create_guest
from xvd.toolstack.xldisk import parse_xl_disk
from xvd.types import DOM0, Domid

_PROGRAM: Final = "from xvd.cli.__main__ import main\nmain()\n"


class Daemons:
    """Made by `daemons`. directory: for images; host: what they meet in; options: the backend's.
    main: the backend's process, or its supervisor's."""

    def __init__(self, directory: Path, options: tuple[str, ...]) -> None:
        self.directory = directory
        self.host = directory / "host"
        self.options = options
        self._program = directory / "xvd"
        self._install()
        self._words = ("backend", "--host", str(self.host), *options)
        self._host = self._start("host", str(self.host))
        self._backend = self._start(*self._words)
        self.main = self._backend.pid

    def _install(self) -> None:
        """Put a program where there may be one, as a package does that is upgraded."""
        new = self._program.with_suffix(".new")
        new.write_text(_PROGRAM)
        new.replace(self._program)

    def _start(self, *words: str, wait: bool = True) -> "subprocess.Popen[bytes]":
        """Start a daemon; return when it says that it is ready."""
        process = subprocess.Popen(
            [sys.executable, str(self._program), *words],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert process.stdout is not None
        if wait:
            process.stdout.readline()
        return process

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
        found = self._ask("workers")
        return next((each["pid"] for each in found if guest in each["domains"]), None)

    def _ask(self, method: str) -> Any:
        with socket.socket(socket.AF_UNIX) as control:
            control.connect(str(self.host / f"control/backend-{DOM0}"))
            control.sendall(b'{"method": "%s", "id": 1}\n' % method.encode())
            with control.makefile("rb") as answer:
                return msgspec.json.decode(answer.readline())["result"]

    def hand_over(self) -> None:
        """Install another version, and reload; return when a process of that serves."""
        self._install()
        before = self.main
        os.kill(before, signal.SIGHUP)
        while self.main == before:
            time.sleep(0.01)
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                self.main = self._ask("about")["pid"]

    def start_anew(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End the backend by a signal, and start another, as a service manager does."""
        self._end(number)
        self._backend = self._start(*self._words, wait=False)
        self.main = self._backend.pid

    def _end(self, number: signal.Signals) -> None:
        pidfd = os.pidfd_open(self.main)
        signal.pidfd_send_signal(pidfd, number)
        select.select([pidfd], [], [])
        os.close(pidfd)
        self._backend.wait()  # which is the first of those that have handed over

    def processes(self) -> list[int]:
        """The backend, and all that it has started."""
        found = [self.main]
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
        self._end(signal.SIGTERM)
        self._host.terminate()
        self._host.wait()


@contextlib.contextmanager
def daemons(*options: str, place: Path) -> Iterator[Daemons]:
    """Have a host, and a backend with these options, in a directory of their own in `place`."""
    with tempfile.TemporaryDirectory(prefix="xvd-", dir=place) as directory:
        both = Daemons(Path(directory), options)
        try:
            yield both
        finally:
            both.close()
