# SPDX-License-Identifier: Apache-2.0
"""What is attached and detached a hundred times costs nothing afterwards."""

import os
import statistics
import time
from pathlib import Path

import pytest
from xen_host import Backend, Disk, Slot, note, sh

CYCLES = int(os.environ.get("XVD_CYCLES", "100"))


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_a_hundred_cycles_leave_nothing_behind(backend: Backend, slot: Slot, image: Path) -> None:
    disk = Disk(image, slot)
    times = []
    for cycle in range(CYCLES + 5):
        if cycle == 5:  # caches and pools are as large as they get
            before, threads, resident = backend.held(), backend.threads(), backend.resident()
        began = time.monotonic()
        disk.attach()
        attached = time.monotonic()
        sh("dd if=/dev/xvda of=/dev/null bs=4k count=4 iflag=direct 2>&1")
        read = time.monotonic()
        disk.detach()
        times.append((attached - began, time.monotonic() - read))
    attach, detach = (statistics.median(column) for column in zip(*times, strict=True))
    growth = (backend.resident() - resident) // 1024
    note(
        f"{CYCLES} cycles of a disk of {slot.name.lower()}: median {attach:.2f} s to attach,"
        f" {detach:.2f} s to detach; the daemon's own memory grew by {growth} KiB"
    )
    assert backend.held() == before
    assert backend.threads() <= threads + 2
    assert backend.resident() < resident + (2 << 20)
    assert sh("find /run/xvd/state/backend-0 -type f") == ""
