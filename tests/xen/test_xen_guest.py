# SPDX-License-Identifier: Apache-2.0
"""A PV guest's kernel uses disks of ours, from `xl create` to its end, however that comes."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from xen_host import Backend, Slot, sh

pytestmark = pytest.mark.usefixtures("no_guest_left")

VERIFY = (
    "fio --name=v --filename=/dev/xvda --direct=1 --ioengine=libaio --iodepth=16 --rw=randrw"
    " --bsrange=512-128k --size=16m --verify=crc32c --verify_fatal=1"
)

LOAD = (
    "fio --name=l --filename=/dev/xvda --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite"
    " --bs=16k --size=32m --time_based --runtime=600"
)


def line(image: Path, slot: Slot) -> str:
    return f"format=raw,vdev=xvda,access=rw,{slot.value},target={image}"


def backend_nodes() -> str:
    """Those of guests; dom0's own disks are another file's."""
    return sh("xenstore-ls -f /local/domain/0 | grep -E '/backend/vbd3?/[1-9]' || true")


def test_a_guest_verifies_its_disk_and_leaves_nothing(
    backend: Backend, slot: Slot, image: Path
) -> None:
    said = sh(f"domu -d '{line(image, slot)}' '{VERIFY} && echo clean'")
    assert "clean" in said
    assert backend_nodes() == ""
    assert backend.held()["grant mappings"] == 0


def test_a_guest_destroyed_under_load_leaves_nothing(
    backend: Backend, slot: Slot, image: Path, eventually: Callable[..., None]
) -> None:
    before = backend.held()
    sh(f"domu -n u1 -b -d '{line(image, slot)}'")
    sh(f"domu -e u1 '({LOAD} > /dev/null 2>&1 &)'")
    eventually(lambda: image.stat().st_blocks > 2048)
    sh("xl destroy u1")
    eventually(lambda: backend_nodes() == "")
    eventually(lambda: backend.held() == before)


def test_a_backend_killed_under_load_is_followed_by_another(
    backend: Backend, slot: Slot, image: Path
) -> None:
    """The guest's fio verifies every block over three deaths of its backend, and sees no error."""
    guest = subprocess.Popen(
        ["domu", "-n", "u1", "-d", line(image, slot), f"{VERIFY} --loops=4 && echo clean"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    for _ in range(3):
        blocks = image.stat().st_mtime_ns
        while image.stat().st_mtime_ns == blocks:
            assert guest.poll() is None, guest.communicate()
        backend.kill()
        backend.start()
    said, _ = guest.communicate(timeout=600)
    assert guest.returncode == 0, said
    assert "clean" in said
