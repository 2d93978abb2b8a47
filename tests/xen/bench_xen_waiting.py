# SPDX-License-Identifier: Apache-2.0
"""What a backend's polling takes from guests that compute: two of them, beside a third one's disk.

Not a test: `xen-rig/test trixie tests/xen/bench_xen_waiting.py` prints the table, in about ten
minutes. The host has two CPUs and each guest one, so that together with dom0 there is never one
to spare. The disk is idle or read all the time, and its backend polls by default or not at all, in
turn; a ratio is the median of the rounds'. What a guest gets is what Xen says that it ran: asking
it by its console takes half a minute when it is so busy.
"""

import statistics
import time
from pathlib import Path

import pytest
from xen_cpu import OtherClock
from xen_host import Backend, Slot, counter, note, sh, typed

ROUNDS = 3
SECONDS = 10
COMPUTING = ("u1", "u2")
WORK = "(while :; do :; done &)"
READING = (
    "(fio --name=l --filename=/dev/xvda --direct=1 --ioengine=libaio --iodepth={depth}"
    " --rw=randread --bs=4k --size=64m --time_based --runtime=3000 > /dev/null 2>&1 &)"
)
SETTINGS: dict[str, tuple[str, ...]] = {"polling": (), "not polling": ("--set", "poll_us=0")}


@pytest.fixture
def domid(guests: None, best_slot: Slot) -> int:
    """Two guests compute; the third has the disk."""
    for name in COMPUTING:
        sh(f"domu -n {name} -m 200 -b")
        typed(name, WORK)
    sh(f"domu -n u3 -m 200 -b -d '{best_slot.line('null:1G,read-zeroes=off')}'")
    return int(sh("xl domid u3"))


def work_done() -> float:
    """CPU seconds of both guests so far, as the last column of `xl list` has them."""
    return sum(float(sh(f"xl list {name}").split()[-1]) for name in COMPUTING)


@pytest.mark.timeout(1500)
def test_guests_that_compute_beside_a_disk(backend: Backend, domid: int) -> None:
    clock = OtherClock(Path("/mnt/host"))
    lines = [
        "| disk | CPUs of the guests, polling | not polling | ratio | reads a second, polling |"
        " not polling |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for disk, depth in (("idle", 0), ("depth 1", 1), ("depth 32", 32)):
        if depth:
            typed("u3", READING.format(depth=depth))
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in SETTINGS}
        for _ in range(ROUNDS):
            for name, words in SETTINGS.items():
                assert backend.stop() == 0
                backend.start(*words)
                found[name].append(measure(clock, domid))
        if depth:
            typed("u3", "killall fio; sleep 1")
        works = {name: [work for work, _ in pairs] for name, pairs in found.items()}
        reads = [statistics.median(read for _, read in pairs) for pairs in found.values()]
        ratio = statistics.median(a / b for a, b in zip(*works.values(), strict=True))
        work = " | ".join(f"{statistics.median(each):.2f}" for each in works.values())
        lines.append(f"| {disk} | {work} | {ratio:.2f} | {reads[0]:,.0f} | {reads[1]:,.0f} |")
    note("\n".join(lines))


def measure(clock: OtherClock, domid: int) -> tuple[float, float]:
    """CPUs that both guests had, and reads a second of the third's disk."""
    began, work, reads = clock.ns(), work_done(), counter(domid, "rd_req")
    time.sleep(SECONDS)
    seconds = (clock.ns() - began) / 1e9
    return (work_done() - work) / seconds, (counter(domid, "rd_req") - reads) / seconds
