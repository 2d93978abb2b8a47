# SPDX-License-Identifier: Apache-2.0
"""Null storage behind three backends in one boot: xvd's, Linux's xen-blkback, and QEMU's qdisk.

Not a test: `make bench SUITE=trixie` runs it, in about ten minutes, and puts its tables into
docs/benchmarks.md; XVD_QUEUES=4 in the environment for so many queues. Two frontends: a Linux guest
with fio, and xvd's load generator in dom0, which costs far less and so shows the backend. All three
disks are attached once, and everything runs in this process: in software emulation a process' start
and an attach take seconds, a measurement two. Only ratios of one boot mean anything.
"""

import asyncio
import functools
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_xen_frontend import qemu_of_dom0
from xen_cpu import Domain0, Meter, OtherClock, kernel_threads, qemu_of
from xen_figures import Figure, keep, markdown
from xen_host import Backend, Slot, negotiated, note, sh

from xvd.frontend.load import Job, LoadResult, run_load
from xvd.frontend.settings import Settings
from xvd.machine.xen.machine import XenMachine

FIGURES = Path(os.environ.get("XVD_FIGURES", "/tmp/figures.jsonl"))
ROUNDS, BUDGET_S = 5, 210
"""Rounds for either frontend, and how long they may take: fewer on a slower machine."""
POLL_US = os.environ.get("XVD_POLL_US")
"""For how long xvd's backend polls before it sleeps, if not for as long as a sleep costs."""
QUEUES = int(os.environ.get("XVD_QUEUES", "1"))
"""Queues that both frontends ask for; QEMU's backend has one."""
SECONDS = 2
NULL = "null:1G,read-zeroes=off"
TRIED = 500
"""Operations by which the speed of a backend is found, which decides how many are measured."""
TRIES, DRIFT_MAX = 5, 0.05
"""How often something is measured whose seconds were longer or shorter than the host's by more."""
SAME = Settings(max_queues=QUEUES, max_ring_page_order=0, feature_persistent=True)
"""What both frontends ask of every backend: a page of ring for each queue, persistent grants, which
QEMU does not have."""


@dataclass(frozen=True)
class Case:
    rw: str
    size: int
    depth: int

    def __str__(self) -> str:
        order = "random" if self.rw.startswith("rand") else "sequential"
        return f"{self.size >> 10} KiB {order} {self.rw.removeprefix('rand')}, depth {self.depth}"

    def job(self, operations: int) -> Job:
        return Job(
            self.size,
            self.depth,
            operations=operations,
            write_percent=100 if self.rw.endswith("write") else 0,
            sequential=not self.rw.startswith("rand"),
        )


CASES = [
    Case("randread", 4096, 32),
    Case("randwrite", 4096, 32),
    Case("randread", 4096, 1),
    Case("randwrite", 4096, 1),
    Case("read", 131072, 8),
    Case("write", 131072, 8),
]


@dataclass(frozen=True)
class Peer:
    """serving: the processes that serve the disk of a domain."""

    name: str
    vdev: str
    line: str
    serving: Callable[[int], list[int]]

    @property
    def number(self) -> int:
        return 202 << 8 | (ord(self.vdev[3]) - ord("a")) << 4


@pytest.fixture(scope="module")
def peers(backend: Backend) -> Iterator[list[Peer]]:
    """Linux's backend serves backend/vbd meanwhile, and ours only the tap slot."""
    sh(f"modprobe xen-blkback max_queues={QUEUES}; modprobe null_blk gb=1 nr_devices=2")
    assert backend.stop() == 0
    words = ["--kind", "vbd3"]
    if QUEUES > 1:  # by default no more than there are CPUs
        words += ["--set", f"max_queues={QUEUES}"]
    if POLL_US:
        words += ["--set", f"poll_us={POLL_US}"]
    backend.start(*words)
    qdisk = "format=raw,vdev=xvdd,access=rw,backendtype=qdisk,target=/dev/nullb1"
    yield [
        Peer("xvd", "xvdb", Slot.TAP.line(NULL, "xvdb"), lambda _: backend.processes()),
        Peer(
            "xen-blkback",
            "xvdc",
            "phy:/dev/nullb0,xvdc,w",
            lambda domid: kernel_threads(f"{domid}.xvdc-"),
        ),
        Peer("QEMU qdisk", "xvdd", qdisk, qemu_of),
    ]
    # Whoever had the disks lets them go a little later than xl says.
    sh("for _ in $(seq 100); do modprobe -r null_blk xen-blkback && exit; sleep 0.1; done; exit 1")


@functools.cache
def host() -> str:
    """What this is, in words."""
    version = re.search(r"^xen_version\s*: (\S+)", sh("xl info"), re.MULTILINE)
    assert version is not None
    return f"Xen {version[1]}, Linux {platform.release()}"


@dataclass(frozen=True)
class Done:
    """front_s: CPU time of the frontend's thread, where it is in dom0."""

    operations: float
    seconds: float
    front_s: float | None = None


class Rounds:
    """The cases in turn, each with every backend in turn, round after round; another begins each.

    measure: does it once, and starts and stops the meter. What is measured while the machine's
    clock goes wrong is measured again.
    """

    def __init__(
        self,
        frontend: str,
        domid: int,
        peers: list[Peer],
        measure: Callable[[Case, Peer, Meter], Done],
    ) -> None:
        self._frontend = frontend
        self._domid = domid
        self._peers = peers
        self._measure = measure
        self._figures: list[Figure] = []
        self._domain0 = Domain0()
        self._host = OtherClock(FIGURES.parent)
        self._rejected = 0

    def run(self, rounds: int, seconds: float) -> None:
        """As many rounds as there is time for, and one at least.

        Figures are kept as they are found: a run that ends early has given something.
        """
        began = time.monotonic()
        for number in range(rounds):
            spent = time.monotonic() - began
            if number and spent * (number + 1) / number > seconds:
                break
            first = number % len(self._peers)
            for case in CASES:
                for peer in self._peers[first:] + self._peers[:first]:
                    figure = self._figure(number, case, peer)
                    self._figures.append(figure)
                    keep(FIGURES, [figure])

    def _figure(self, number: int, case: Case, peer: Peer) -> Figure:
        for _ in range(TRIES):
            meter = Meter(self._domain0, self._host, lambda: peer.serving(self._domid))
            done = self._measure(case, peer, meter)
            if abs(meter.drift - 1) < DRIFT_MAX:
                break
            self._rejected += 1
        else:
            pytest.fail(f"this machine's clock goes {meter.drift:.2f} times as fast as its host's")
        return Figure(
            host(),
            QUEUES,
            self._frontend,
            str(case),
            peer.name,
            number,
            round(done.operations),
            done.seconds,
            dom0_us=meter.dom0_ns / 1e3 / done.operations,
            back_us=meter.back_ns / 1e3 / done.operations,
            front_us=None if done.front_s is None else done.front_s * 1e6 / done.operations,
        )

    def report(self) -> None:
        order = [peer.name for peer in self._peers]
        found = sorted(self._figures, key=lambda figure: order.index(figure.backend))
        text = (
            f"{self._rejected} measured again, because the clock went wrong"
            if self._rejected
            else ""
        )
        note(f"{markdown(found)}{text}")


AGREED = {
    "protocol",
    "feature-persistent",
    "feature-max-indirect-segments",
    "ring-page-order",
    "max-ring-page-order",
    "multi-queue-num-queues",
    "multi-queue-max-queues",
    "sector-size",
}


def report_agreements(frontend: str, agreed: dict[str, dict[str, tuple[str, str]]]) -> None:
    """A number of queues or an order of pages that the frontend has not written is 1 or 0."""
    lines = [f"{frontend}: what was agreed on, as the frontend / the backend has it\n"]
    lines.append(f"| node | {' | '.join(agreed)} |")
    lines.append("|---|" + "---|" * len(agreed))
    for name in sorted(AGREED):
        cells = (
            " / ".join(side or "-" for side in nodes.get(name, ("", "")))
            for nodes in agreed.values()
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    note("\n".join(lines))
    for name, nodes in agreed.items():
        queues = 1 if "QEMU" in name else QUEUES
        assert nodes.get("ring-page-order", ("",))[0] in ("", "0")
        assert int(nodes.get("multi-queue-num-queues", ("",))[0] or "1") == queues


class Console:
    """A guest's shell, driven without starting a process for every look at what it says."""

    def __init__(self, guest: str) -> None:
        domid = sh(f"xl domid {guest}").strip()
        self.domid = int(domid)
        self._tty = Path(sh(f"xenstore-read /local/domain/{domid}/console/tty").strip())
        self._log = Path(f"/var/log/xen/guest-{guest}.log")
        self._number = 0

    def run(self, command: str) -> str:
        start = self._log.stat().st_size
        self._number += 1
        # The quotes keep the echo of the typed line from looking like the answer.
        self._tty.write_text(f'{command}; echo DONE{self._number}""=$?\n')
        end = time.monotonic() + 60
        while True:
            said = self._log.read_bytes()[start:].decode(errors="replace").replace("\r", "")
            if match := re.search(rf"^DONE{self._number}=(\d+)$", said, re.MULTILINE):
                assert match[1] == "0", said
                return said[: match.start()]
            assert time.monotonic() < end, said
            time.sleep(0.05)


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("guests")
def test_a_linux_guest_with_fio(peers: list[Peer]) -> None:
    disks = " ".join(f"-d '{peer.line}'" for peer in peers)
    asked = f"xen_blkfront.max_queues={QUEUES} xen_blkfront.max_ring_page_order=0"
    asked += " tsc=reliable clocksource=tsc"  # as dom0 has it (xen-rig/run)
    sh(f"domu -n u1 -m 384 -c {QUEUES} -b -k '{asked}' {disks}")
    console = Console("u1")

    def fio(case: Case, peer: Peer, meter: Meter) -> Done:
        meter.start()
        said = console.run(
            f"fio --name=b --filename=/dev/{peer.vdev} --direct=1 --ioengine=libaio --rw={case.rw}"
            f" --bs={case.size} --iodepth={case.depth} --size=256m --time_based"
            f" --runtime={SECONDS} --numjobs={QUEUES} --group_reporting --norandommap --minimal"
            " 2>/dev/null | cut -d';' -f8,9,49,50"
        )
        meter.stop()
        read, read_ms, write, write_ms = (float(text) for text in said.split()[-1].split(";"))
        iops, ms = (read, read_ms) if read else (write, write_ms)
        return Done(iops * ms / 1e3, ms / 1e3)

    title = "A Linux guest with fio"
    rounds = Rounds(title, console.domid, peers, fio)
    rounds.run(ROUNDS, BUDGET_S)
    rounds.report()
    report_agreements(title, {peer.name: negotiated(console.domid, peer.number) for peer in peers})


class Loads:
    """xvd's load generator on disks of dom0's own, in this process."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._speeds: dict[tuple[Case, Peer], float] = {}
        self.agreed: dict[str, dict[str, tuple[str, str]]] = {}

    def measure(self, case: Case, peer: Peer, meter: Meter) -> Done:
        """As many operations as will take a while: the backends differ by a factor of twenty."""
        operations = int(self._speeds.get((case, peer), 0) * SECONDS)
        if operations < TRIED:
            self._speeds[case, peer] = self._load(case, peer, meter, TRIED).iops
            operations = max(TRIED, int(self._speeds[case, peer] * SECONDS))
        result = self._load(case, peer, meter, operations)
        assert result.errors == 0
        self._speeds[case, peer] = result.iops
        return Done(result.operations, result.seconds, result.cpu_s)

    def _load(self, case: Case, peer: Peer, meter: Meter, operations: int) -> LoadResult:
        return self._runner.run(self._run(case.job(operations), peer, meter))

    async def _run(self, job: Job, peer: Peer, meter: Meter) -> LoadResult:
        def ended() -> None:
            meter.stop()
            if peer.name not in self.agreed:
                self.agreed[peer.name] = negotiated(0, peer.number)

        machine = await XenMachine.here()
        store = await machine.xenstore()
        path = f"device/vbd/{peer.number}"
        try:
            return await run_load(
                machine, store, path, job, settings=SAME, on_start=meter.start, on_end=ended
            )
        finally:
            await store.close()
            machine.close()


@pytest.mark.timeout(900)
def test_the_load_generator_in_dom0(peers: list[Peer]) -> None:
    qemu_of_dom0()
    sh("modprobe -r xen-blkfront")
    loads = Loads()
    title = "xvd's load generator in dom0"
    try:
        for peer in peers:
            sh(f"xl block-attach 0 '{peer.line}'")
        rounds = Rounds(title, 0, peers, loads.measure)
        rounds.run(ROUNDS, BUDGET_S)
        rounds.report()
        report_agreements(title, loads.agreed)
    finally:
        for peer in peers:
            # Linux's backend and QEMU wait for a frontend that answers; there is none now.
            sh(f"xl block-detach {'' if peer.name == 'xvd' else '-f'} 0 {peer.vdev} || true")
        sh("modprobe xen-blkfront")
