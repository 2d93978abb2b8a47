# SPDX-License-Identifier: Apache-2.0
"""GRUB's own frontend boots from a disk of ours, and hands it over to the Linux it has loaded.

It is nobody's blkfront: it stays in state 3 while it reads, closes, begins again with empty keys,
and waits for a backend that offers anew.
"""

import base64
import time
from pathlib import Path

import pytest
from xen_host import COMPLAINTS, ON_ARM, Backend, Slot, sh

pytestmark = pytest.mark.skipif(ON_ARM, reason="Debian has a GRUB with a frontend for x86 only")

CONFIG = """set timeout=0
menuentry rig {{
    linux /boot/vmlinux console=hvc0 quiet rigcmd="{job}"
    initrd /boot/domu.cpio.gz
}}
"""


@pytest.fixture
def bootable(tmp_path: Path) -> Path:
    """An ext2 image with GRUB's menu, a kernel, an initramfs, and something to find."""
    job = (
        "modprobe -a crc32c_generic ext4; mount -t ext4 -o ro /dev/xvda /mnt && cat /mnt/found &&"
        f" ! {COMPLAINTS}"
    )
    tree = tmp_path / "tree"
    (tree / "boot/grub").mkdir(parents=True)
    words = base64.b64encode(job.encode()).decode()
    (tree / "boot/grub/grub.cfg").write_text(CONFIG.format(job=words))
    (tree / "found").write_text("the same disk\n")
    sh(f"cp /boot/vmlinux /boot/domu.cpio.gz {tree}/boot")
    image = tmp_path / "boot.img"
    sh(f"mke2fs -q -t ext2 -d {tree} {image} 140M; rm -r {tree}")
    return image


@pytest.mark.usefixtures("guests")
def test_grub_boots_from_a_disk_and_linux_takes_it_over(
    backend: Backend, slot: Slot, bootable: Path, tmp_path: Path
) -> None:
    config = tmp_path / "g1.cfg"
    config.write_text(
        "name='g1'\ntype='pv'\nmemory=320\nkernel='/usr/lib/grub-xen/grub-x86_64-xen.bin'\n"
        f"on_poweroff='destroy'\non_crash='destroy'\ndisk=['{slot.line(bootable)}']\n"
    )
    console = Path("/var/log/xen/guest-g1.log")
    console.unlink(missing_ok=True)
    sh(f"xl create -q {config} < /dev/null > /dev/null 2>&1")
    end = time.monotonic() + 200
    while not (console.exists() and "RIG-STATUS" in console.read_text(errors="replace")):
        said = console.read_text(errors="replace") if console.exists() else ""
        assert time.monotonic() < end, said + backend.log()[-2000:]
        time.sleep(0.2)
    said = console.read_text(errors="replace")
    assert "the same disk" in said
    assert "RIG-STATUS 0" in said
