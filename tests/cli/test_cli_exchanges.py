# SPDX-License-Identifier: Apache-2.0
"""Storage of every kind is exchanged for every other by real processes, and the backend is killed
meanwhile, under a load that knows what each storage holds.

XVD_SWAPS says how often storage is exchanged, and XVD_KILLS how many of those times the backend is
killed at some moment of it, and as often while it only serves. Stalls are printed (pytest -s).
"""

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ceph import Cluster, running_cluster
from exchanges import SIZE, USERS, Storages, told, use
from xvd_process import Daemon, run_xvd

from xvd.frontend.disk import Disk
from xvd.frontend.settings import Settings
from xvd.machine.emulated.service import EmulatedHost
from xvd.toolstack.vbd import attach, create_guest
from xvd.toolstack.xldisk import parse_xl_disk
from xvd.types import DOM0, Domid

pytestmark = [pytest.mark.slow, pytest.mark.tools]

GUEST = Domid(1)
SWAPS = int(os.environ.get("XVD_SWAPS", "12"))
KILLS = int(os.environ.get("XVD_KILLS", "3"))
MOMENT_S = 0.6
"""An exchange and the start of its command take about so long; a kill comes at any time of it."""


@pytest.fixture
def cluster(tmp_path: Path, requires_tool: Callable[[str], str]) -> Iterator[Cluster]:
    with running_cluster(tmp_path / "ceph", requires_tool) as cluster:
        yield cluster


class Backend:
    """A backend in a process of its own, on a host that is in ours. Its calls take threads."""

    def __init__(self, directory: Path) -> None:
        self._host = ("--host", str(directory))
        self._process = Daemon("backend", *self._host)

    def swap(self, image: str) -> None:
        """Exchange the storage."""
        done = run_xvd("swap", "1", "xvda", image, *self._host)
        assert done.returncode == 0, done.stderr

    def swap_and_die(self, image: str, after_s: float) -> None:
        """Be killed some time after an exchange was begun, and start again."""
        command = [sys.executable, "-m", "xvd.cli", "swap", "1", "xvda", image, *self._host]
        swapping = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            swapping.wait(after_s)
        self.die()
        swapping.wait(60)

    def die(self) -> None:
        """Be killed, and start again; return when the disk is served."""
        self._process.kill()
        self._process = Daemon("backend", *self._host)
        while not self._counters().get("requests"):
            pass

    def target(self) -> str:
        """What the disk has, by the words of the command line."""
        listed = run_xvd("list", "--json", *self._host)
        assert listed.returncode == 0, listed.stderr
        return str(json.loads(listed.stdout)[0]["target"])

    def _counters(self) -> dict[str, int]:
        """Of the disk; nothing while there is none."""
        shown = run_xvd("stats", "--json", *self._host)
        disks = json.loads(shown.stdout)["backend-0"] if shown.returncode == 0 else []
        return dict(disks[0].get("counters", {})) if disks else {}

    def errors(self) -> int:
        """What the present process has answered with an error."""
        return self._counters()["errors"]

    def close(self) -> None:
        assert self._process.stop() == 0


class Exchanges:
    """One exchange after another, and kills at some of them. kinds: of storage; the first is the
    disk's."""

    def __init__(self, backend: Backend, kinds: list[str]) -> None:
        self.storages = Storages(kinds[0])
        self.at_kills: list[float] = []
        """The longest stall around each kill, seconds."""
        self.errors = 0
        self._backend = backend
        self._kinds = kinds
        self._now = kinds[0]
        self._draw = random.Random(2)

    async def run(self) -> None:
        """Do all of it."""
        killed = set(self._draw.sample(range(1, SWAPS), min(KILLS, SWAPS - 1)))
        # What is in memory ends with its process: at a kill neither side may be there.
        lasting = [kind for kind in self._kinds if not kind.startswith("memory")]
        for number in range(SWAPS):
            soon = {number, number + 1} & killed
            others = [kind for kind in (lasting if soon else self._kinds) if kind != self._now]
            image = self._draw.choice(others)
            if number in killed and self._now in lasting:
                await self._kill(image)
            else:
                await self.storages.exchange(
                    image,
                    lambda: asyncio.to_thread(self._backend.swap, image),  # noqa: B023
                )
                self._now = image
        self.errors += await asyncio.to_thread(self._backend.errors)

    async def _kill(self, image: str) -> None:
        """Kill it at some moment of an exchange, and once more while it serves and nothing else."""
        self.errors += await asyncio.to_thread(self._backend.errors)
        before, after_s = self._now, self._draw.random() * MOMENT_S

        async def swap() -> None:
            await asyncio.to_thread(self._backend.swap_and_die, image, after_s)
            self._now = await asyncio.to_thread(self._backend.target)
            if self._now != image:
                assert self._now == before
                self.storages.stayed(before)

        await self.storages.exchange(image, swap)
        self.at_kills.append(self.storages.stalls.pop())
        self.storages.stalls.append(0.0)
        await asyncio.to_thread(self._backend.die)
        self.at_kills.append(self.storages.stalls.pop())


def test_nothing_is_lost_whatever_is_exchanged_and_whoever_is_killed(
    tmp_path: Path, requires_tool: Callable[[str], str], cluster: Cluster
) -> None:
    requires_tool("qemu-storage-daemon")
    raw, qcow2, host = tmp_path / "disk.img", tmp_path / "disk.qcow2", tmp_path / "host"
    raw.write_bytes(bytes(SIZE))
    host.mkdir()
    words = [requires_tool("qemu-img"), "create", "-q", "-f", "qcow2", str(qcow2), str(SIZE)]
    subprocess.run(words, check=True)
    kinds = [str(raw), f"qcow2:{qcow2}", "memory:8M", cluster.image("exchanged", SIZE)]

    async def work() -> None:
        async with EmulatedHost() as machines:
            await machines.listen(host)
            backend = await asyncio.to_thread(Backend, host)
            store = await machines.machine(DOM0).xenstore()
            machines.create_domain(GUEST)
            await create_guest(store, GUEST, "guest")
            vbd = await attach(store, GUEST, parse_xl_disk(f"vdev=xvda,target={kinds[0]}"))
            guest = machines.machine(GUEST)
            its_store, path = await guest.xenstore(), f"device/vbd/{vbd.vdev}"
            async with await Disk.open(
                guest, its_store, path, settings=Settings(max_queues=2)
            ) as disk:
                stop, exchanges = asyncio.Event(), Exchanges(backend, kinds)
                users = [
                    asyncio.ensure_future(use(disk, exchanges.storages, n, stop))
                    for n in range(USERS)
                ]
                exchanging = asyncio.ensure_future(exchanges.run())
                await asyncio.wait([*users, exchanging], return_when=asyncio.FIRST_COMPLETED)
                stop.set()
                await asyncio.gather(*users)
                await exchanging
            await its_store.close()
            await store.close()
            await asyncio.to_thread(backend.close)
            assert exchanges.errors == 0
            print(f"{SWAPS} exchanges: stalls of {told(exchanges.storages.stalls)}; "
                  f"{len(exchanges.at_kills)} kills: {told(exchanges.at_kills)}")  # fmt: skip

    async def limited() -> None:
        async with asyncio.timeout(90 + 4 * SWAPS + 10 * KILLS):
            await work()

    asyncio.run(limited())
