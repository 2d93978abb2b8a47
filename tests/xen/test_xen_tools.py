# SPDX-License-Identifier: Apache-2.0
"""What an administrator does with the toolstack's own tools, and what they show."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from xen_host import ON_ARM, Backend, Disk, Slot, backend_nodes, sh


def xl(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["xl", *words], check=False, capture_output=True, text=True, timeout=60)


def test_block_list_shows_a_connected_disk(attached: Disk) -> None:
    row = sh("xl block-list 0").splitlines()[-1].split()
    assert row[:2] == ["51712", "0"]
    assert row[3] == "4"


def test_xentop_shows_what_was_read(
    backend: Backend, best_slot: Slot, image: Path, eventually: Callable[..., None]
) -> None:
    if best_slot is Slot.VBD:
        pytest.skip(
            "of backend/vbd xentop reads the kernel driver's sysfs, which only it can write"
        )
    disk = Disk(image, best_slot)
    disk.attach()
    sh("dd if=/dev/xvda of=/dev/null bs=64k count=16 iflag=direct 2>&1")

    def sectors_read() -> int:
        [row] = [row for row in sh("xentop -b -i 1 -x").splitlines() if "51712" in row]
        return int(row.partition("RSECT:")[2].split()[0])

    try:
        eventually(lambda: sectors_read() >= 2048)
    finally:
        disk.detach()


def test_a_disk_in_use_is_detached_and_its_user_sees_errors(
    backend: Backend, slot: Slot, image: Path
) -> None:
    """Linux's frontend gives way since 5.15, whoever has it open; nothing waits for anybody."""
    disk = Disk(image, slot)
    disk.attach()
    sh("mkfs.ext4 -q /dev/xvda; mount /dev/xvda /mnt/out")
    disk.detach()
    sh("! dd if=/dev/urandom of=/mnt/out/file bs=1M count=1 conv=fsync 2>&1; umount /mnt/out")


def test_detach_by_force_needs_no_backend(backend: Backend, slot: Slot, image: Path) -> None:
    """It fails after ten seconds, as with any backend that is dead, and has removed the nodes."""
    disk = Disk(image, slot)
    disk.attach()
    backend.kill()
    try:
        xl("block-detach", "--force", "0", "xvda")
        assert sh("xenstore-ls -f /local/domain/0/backend | grep -E '/vbd3?/0/' || true") == ""
    finally:
        backend.start()
    disk.attach()
    disk.detach()


def test_a_guest_that_crashes_leaves_nothing(
    backend: Backend, best_slot: Slot, image: Path, guests: None, eventually: Callable[..., None]
) -> None:
    # On ARM Linux tells Xen of no panic (6.12): such a guest stands still unless it is to reboot.
    words = "-k panic=1" if ON_ARM else ""
    sh(f"domu -n u1 -b {words} -d '{best_slot.line(image)}'")
    subprocess.run(
        ["domu", "-e", "u1", "echo c > /proc/sysrq-trigger"],
        check=False, env=os.environ | {"DOMU_TENTHS": "20"},
    )  # fmt: skip
    eventually(lambda: backend_nodes() == "")


def test_doctor_finds_what_a_host_needs(backend: Backend) -> None:
    said = sh("xvd doctor")
    for what in ("/dev/xen/evtchn", "/dev/xen/gntdev", "xenstore", "backend/vbd ", "backend/vbd3"):
        [line] = [line for line in said.splitlines() if f" {what}" in line]
        assert line.startswith("ok"), said


def test_doctor_names_linuxs_backend() -> None:
    sh("modprobe xen-blkback")
    try:
        assert "xen-blkback" in subprocess.run(
            ["xvd", "doctor"], check=False, capture_output=True, text=True
        ).stdout  # fmt: skip
    finally:
        sh("modprobe -r xen-blkback")
