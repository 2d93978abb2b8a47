# SPDX-License-Identifier: Apache-2.0
"""A backend goes on as a process of the program that is installed by now: real processes."""

import asyncio
import contextlib
import os
import select
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from rig_disk import run
from service_manager import Manager
from verified_load import advances, contents_of, load
from xvd_process import Daemon, as_by_the_unit, run_xvd

from xvd.cli import succession
from xvd.cli.asking import ask
from xvd.cli.running import Stop
from xvd.errors import PeerClosed
from xvd.frontend.disk import Disk
from xvd.machine.emulated.service import connect
from xvd.types import Domid

pytestmark = pytest.mark.slow

SIZE = 8 << 20
PROGRAM = "from xvd.cli.__main__ import main\nmain()\n"


class Service:
    """A host with a disk, and a backend by a program of its own, that a manager looks after."""

    def __init__(self, place: Path, isolation: str) -> None:
        self.host, self.log, self.program = place / "host", place / "log", place / "xvd"
        self.install(PROGRAM)
        self.machine = Daemon("host", str(self.host))
        self.manager = Manager(place / "notify")
        told = f"NOTIFY_SOCKET={place / 'notify'}", "WATCHDOG_USEC=60000000"
        with self.log.open("w") as log:
            self.first = Daemon(
                "backend", "--host", str(self.host), "--isolation", isolation,
                stderr=log, by=(*as_by_the_unit(), "env", *told), program=[str(self.program)],
            )  # fmt: skip
        self.main_pid = self.first.process.pid
        self.manager.hear("READY=1")
        self.first.process.stdout.close()  # as whoever started it does who waited for its line
        image = place / "disk.img"
        image.touch()
        os.truncate(image, SIZE)
        run_xvd("attach", "1", f"vdev=xvda,target={image}", "--host", str(self.host))

    def install(self, text: str) -> None:
        """Put another version in the place of the program, as a package does."""
        new = self.program.with_name("new")
        new.write_text(text)
        new.replace(self.program)

    def reload(self) -> str:
        """Ask it to; what it tells between the beginning and the end of that."""
        os.kill(self.main_pid, signal.SIGHUP)
        while "RELOADING=1" not in self.manager.next():
            pass
        told = self.manager.next()
        if told.startswith("MAINPID="):
            self.main_pid = int(told.partition("=")[2])
            self.manager.hear("READY=1")
        return told

    def serving(self) -> int:
        """The process that answers."""
        return int(asyncio.run(ask(self.host / "control/backend-0", "about"))["pid"])

    def close(self) -> None:
        """End whichever serves; it has to end as it is asked to."""
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(self.main_pid)
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            self.manager.hear("STOPPING=1")
            assert select.select([pidfd], [], [], 30)[0]
            os.close(pidfd)
        self.manager.close()
        self.first.kill()
        self.machine.kill()


@asynccontextmanager
async def disk_of(service: Service) -> AsyncIterator[Disk]:
    machine = connect(service.host, Domid(1))
    store = await machine.xenstore()
    async with await Disk.open(machine, store, "device/vbd/51712") as disk:
        yield disk
    await store.close()
    machine.close()


@pytest.mark.parametrize("isolation", ["shared", "guest"])
def test_another_version_takes_the_disks_over_without_an_error(
    tmp_path: Path, isolation: str
) -> None:
    service = Service(tmp_path, isolation)

    async def work() -> None:
        async with disk_of(service) as disk:
            contents, stop = contents_of(disk, SIZE, 2), asyncio.Event()
            using = asyncio.ensure_future(load(contents, stop))
            for _ in range(3):
                service.install(PROGRAM)
                await asyncio.to_thread(service.reload)
                await advances(contents, 20)
            stop.set()
            await using
            assert disk.connections == 1

    try:
        run(work(), 100)
        assert service.first.wait() == 0
        assert service.serving() == service.main_pid != service.first.process.pid
    finally:
        service.close()
    assert service.log.read_text() == ""


def test_a_version_that_does_not_begin_leaves_the_one_that_runs(tmp_path: Path) -> None:
    service = Service(tmp_path, "guest")

    async def work() -> None:
        async with disk_of(service) as disk:
            service.install('raise SystemExit("half of it is missing")')
            assert await asyncio.to_thread(service.reload) == "READY=1"
            await disk.write(0, bytes(4096))

    try:
        run(work(), 60)
        assert service.serving() == service.first.process.pid
    finally:
        service.close()
    assert service.log.read_text().splitlines() == [
        "half of it is missing",
        "xvd: ERROR: all stays as it was: the program that is installed now does not begin: "
        "it ended; the lines before this one say why",
    ]


def test_a_version_that_hangs_is_ended_and_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(succession, "READY_S", 0.1)
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-c", "import time; time.sleep(100)"])
    here = succession.Succession(Stop.__new__(Stop), None)

    with pytest.raises(PeerClosed, match=r"does not begin: not within 0\.1 s"):
        asyncio.run(here.hand_over())

    assert not here.has_successor
