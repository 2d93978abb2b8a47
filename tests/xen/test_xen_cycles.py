# SPDX-License-Identifier: Apache-2.0
"""What is attached and detached a hundred times costs nothing afterwards."""

import os
from pathlib import Path

import pytest
from xen_host import Backend, Disk, Slot, sh


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_a_hundred_cycles_leave_nothing_behind(backend: Backend, slot: Slot, image: Path) -> None:
    disk = Disk(image, slot)
    disk.attach()
    disk.detach()
    before = backend.held()
    for _ in range(int(os.environ.get("XVD_CYCLES", "100"))):
        disk.attach()
        sh("dd if=/dev/xvda of=/dev/null bs=4k count=4 iflag=direct 2>&1")
        disk.detach()
    assert backend.held() == before
    assert sh("ls /run/xvd/state/backend-0") == ""
