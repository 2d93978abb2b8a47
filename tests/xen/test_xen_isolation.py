# SPDX-License-Identifier: Apache-2.0
"""A process for each guest, on real Xen: what it can reach, and what its death costs."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from xen_host import COMPLAINTS, VERIFY, Backend, Slot, domu, note, sh, typed

from xvd.service.sandbox.confine import USER_BASE

pytestmark = pytest.mark.usefixtures("guests")

KILLS = int(os.environ.get("XVD_KILLS", "10"))
READS = (
    "fio --name=r --filename=/dev/xvda --direct=1 --ioengine=psync --rw=randread --bs=4k --size=16m"
    " --time_based --runtime={} --output-format=terse --terse-version=3"
)


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_a_guests_process_is_confined(backend: Backend, slot: Slot, image: Path) -> None:
    domu("-n", "u1", "-b", "-d", slot.line(image))
    domid = int(sh("xl domid u1"))

    worker = backend.worker(domid)

    assert worker["confined"]
    told = status(worker["pid"])
    assert told["Uid"].split() == [str(USER_BASE + domid)] * 4
    assert int(told["CapEff"], 16) == int(told["CapPrm"], 16) == 0
    assert (told["NoNewPrivs"], told["Seccomp"]) == ("1", "2")
    typed("u1", f"{VERIFY} && ! {COMPLAINTS}")


def test_an_image_format_takes_a_process_with_programs(
    backend: Backend, best_slot: Slot, tmp_path: Path, requires_tool: Callable[[str], str]
) -> None:
    requires_tool("qemu-storage-daemon")
    image = tmp_path / "disk.qcow2"
    sh(f"qemu-img create -q -f qcow2 {image} 64M")

    domu("-n", "u1", "-b", "-d", best_slot.line(f"qcow2:{image}"))

    worker = backend.worker(int(sh("xl domid u1")))
    assert not worker["confined"]
    assert int(status(worker["pid"])["CapEff"], 16) == 0
    typed("u1", f"{VERIFY} && ! {COMPLAINTS}")


@pytest.mark.timeout(900)
def test_the_process_of_one_guest_is_killed_and_another_guest_sees_nothing(
    backend: Backend, best_slot: Slot, make_image: Callable[..., Path],
    eventually: Callable[..., None],
) -> None:  # fmt: skip
    for guest in (1, 2):
        line = best_slot.line(make_image(f"{guest}.img"))
        domu("-n", f"u{guest}", "-m", "200", "-b", "-d", line)
    first = int(sh("xl domid u1"))
    calm = typed("u2", READS.format(10))
    typed("u1", f"(({VERIFY} --loops=20; echo $? > /tmp/status) > /tmp/log 2>&1 &)")
    busy = typed("u2", READS.format(10))
    typed("u2", f"({READS.format(600)} > /tmp/reads 2>&1 &)")

    for _ in range(KILLS):
        before = backend.worker(first)["pid"]
        os.kill(before, signal.SIGKILL)
        eventually(partial(has_another, backend, first, before))

    typed("u2", "killall -INT fio; while pidof fio; do sleep 1; done")
    typed("u1", "while ! [ -e /tmp/status ]; do sleep 1; done")
    assert typed("u1", "cat /tmp/status").split() == ["0"]
    typed("u1", f"! {COMPLAINTS}")
    worst = [longest_read(said) for said in (calm, busy, typed("u2", "cat /tmp/reads"))]
    note(
        f"{KILLS} kills of one guest's process; another guest's longest read: {worst[0]} us alone, "
        f"{worst[1]} us beside it, {worst[2]} us while it is killed"
    )


def has_another(backend: Backend, domid: int, before: int) -> bool:
    return backend.worker(domid)["pid"] not in (None, before)


def longest_read(said: str) -> int:
    """Microseconds of the longest read that fio tells of in its terse format."""
    [line] = [line for line in said.splitlines() if line.startswith("3;")]
    return int(line.split(";")[14])
