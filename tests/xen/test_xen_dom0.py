# SPDX-License-Identifier: Apache-2.0
"""dom0's own kernel uses a disk of ours: xen-blkfront against `xvd backend`, by unmodified xl."""

import hashlib
import json
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from xen_host import Backend, Disk, Slot, sh

with_qemu_img = pytest.mark.skipif(
    not shutil.which("qemu-img"), reason="there is no qemu-img for this dom0"
)


def test_a_file_system_through_the_ring_is_the_one_in_the_image(attached: Disk) -> None:
    sh(
        "mkfs.ext4 -q /dev/xvda; mount /dev/xvda /mnt/out;"
        "cp -r /usr/lib/python3*/json /etc /mnt/out;"
        "umount /mnt/out; e2fsck -fn /dev/xvda; blockdev --flushbufs /dev/xvda"
    )
    seen = hashlib.md5(attached.device.read_bytes()).hexdigest()
    assert seen == hashlib.md5(attached.image.read_bytes()).hexdigest()


def test_fio_verifies_what_it_wrote(attached: Disk) -> None:
    sh(
        "fio --name=v --filename=/dev/xvda --direct=1 --ioengine=libaio --iodepth=32 --rw=randrw"
        " --bsrange=512-256k --size=32m --verify=crc32c --verify_fatal=1"
    )


def test_discard_gives_space_back(attached: Disk) -> None:
    sh("dd if=/dev/urandom of=/dev/xvda bs=1M count=16 oflag=direct 2>&1")
    before = attached.image.stat().st_blocks
    sh("blkdiscard -o 0 -l 8388608 /dev/xvda")
    assert before - attached.image.stat().st_blocks == 8388608 // 512


def test_a_read_only_disk_cannot_be_written(backend: Backend, slot: Slot, image: Path) -> None:
    disk = Disk(image, slot, access="ro")
    disk.attach()
    try:
        assert sh("blockdev --getro /dev/xvda") == "1\n"
        with pytest.raises(PermissionError), disk.device.open("r+b", buffering=0) as file:
            file.write(bytes(512))
    finally:
        disk.detach()


def test_an_image_that_is_not_there_fails_the_attach_and_nothing_else(
    backend: Backend, tmp_path: Path
) -> None:
    line = Disk(tmp_path / "nothing", Slot.VBD).line
    done = subprocess.run(["xl", "block-attach", "0", line], check=False)
    assert done.returncode != 0
    subprocess.run(["xl", "block-detach", "--force", "0", "xvda"], check=False)
    assert backend.held()["grant mappings"] == 0
    assert sh("xenstore-ls -f /local/domain/0 | grep ^/local/domain/0/backend/vbd/ || true") == ""
    assert "no such image" in sh("xenstore-read error/backend/vbd/0/51712/error")
    sh("xenstore-rm error")  # stays for the administrator, as Linux's backends leave theirs


@with_qemu_img
def test_an_attach_waits_for_storage_that_takes_longer_to_open_than_libxl_waits(
    backend: Backend, slot: Slot, image: Path, tmp_path: Path
) -> None:
    """A server of NBD that is there, and says nothing yet."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{tmp_path}/nbd")
        listening.listen(1)
        disk = Disk(image, slot, uri=f"nbd+unix:///?socket={tmp_path}/nbd")
        attaching = subprocess.Popen(["xl", "block-attach", "0", disk.line])
        with pytest.raises(subprocess.TimeoutExpired):
            attaching.wait(15)
        server = subprocess.Popen(
            f"LISTEN_PID=$$ LISTEN_FDS=1 exec qemu-nbd -t -f raw {image} 3<&{listening.fileno()}",
            shell=True,
            pass_fds=[listening.fileno()],
        )
    try:
        assert attaching.wait(60) == 0
        sh("dd if=/dev/urandom of=/dev/xvda bs=1M count=1 oflag=direct 2>&1")
    finally:
        disk.detach()
        server.terminate()
        assert server.wait(30) == 0


def test_its_storage_is_exchanged_under_a_verifying_load(attached: Disk, tmp_path: Path) -> None:
    load = subprocess.Popen(
        "fio --name=v --filename=/dev/xvda --direct=1 --ioengine=libaio --iodepth=8 --rw=randrw"
        " --bsrange=512-64k --size=16m --loops=3 --verify=crc32c --verify_fatal=1 2>&1",
        shell=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    here, there = attached.image, tmp_path / "other.img"
    for _ in range(3):
        sh(
            f"xvd pause 0 xvda && cp --sparse=always {here} {there}"
            f" && xvd swap 0 xvda {there} && xvd resume 0 xvda"
        )
        here, there = there, here
    said, _ = load.communicate(timeout=200)
    assert load.returncode == 0, said
    sh("blockdev --flushbufs /dev/xvda")
    seen = hashlib.md5(attached.device.read_bytes()).hexdigest()
    assert seen == hashlib.md5(here.read_bytes()).hexdigest()


@with_qemu_img
def test_an_overlay_of_a_golden_image_is_verified_and_exchanged_for_a_raw_one(
    backend: Backend, slot: Slot, tmp_path: Path
) -> None:
    sh(
        f"cd {tmp_path}; dd if=/dev/urandom of=golden.raw bs=1M count=64 2>&1;"
        "qemu-img convert -f raw -O qcow2 golden.raw golden;"
        "qemu-img create -q -f qcow2 -b golden -F qcow2 overlay"
    )
    disk = Disk(Path(f"qcow2:{tmp_path}/overlay"), slot)
    disk.attach()
    try:
        assert sh("md5sum </dev/xvda") == sh(f"md5sum <{tmp_path}/golden.raw")
        sh(
            "fio --name=v --filename=/dev/xvda --direct=1 --ioengine=libaio --iodepth=16"
            " --rw=randrw --bsrange=512-128k --size=16m --verify=crc32c --verify_fatal=1"
        )
        seen = sh("blockdev --flushbufs /dev/xvda; md5sum </dev/xvda")
        sh(
            f"xvd pause 0 xvda; cd {tmp_path}; qemu-img convert -U -O raw overlay moved;"
            f"xvd swap 0 xvda {tmp_path}/moved; xvd resume 0 xvda; blockdev --flushbufs /dev/xvda"
        )
        assert sh("md5sum </dev/xvda") == seen
    finally:
        disk.detach()
    assert "No errors were found" in sh(f"qemu-img check {tmp_path}/overlay")


@with_qemu_img
def test_it_is_mirrored_and_moves_under_a_verifying_load(
    backend: Backend, slot: Slot, tmp_path: Path
) -> None:
    sh(
        f"cd {tmp_path}; dd if=/dev/urandom of=golden bs=1M count=32 2>&1; truncate -s 64M golden;"
        "qemu-img create -q -f qcow2 -b golden -F raw overlay"
    )
    disk = Disk(Path(f"qcow2:{tmp_path}/overlay"), slot)
    disk.attach()
    try:
        fio = subprocess.Popen(
            "fio --name=v --filename=/dev/xvda --direct=1 --ioengine=libaio --iodepth=16"
            " --rw=randwrite --bs=4k --size=16m --verify=crc32c --verify_fatal=1 --loops=6"
            " --rate_iops=400",
            shell=True,
            stdout=subprocess.DEVNULL,
        )
        sh("xvd snapshot create 0 xvda early")
        assert sh("xvd snapshot list 0 xvda").startswith("early ")
        assert "ready" in sh(f"xvd mirror 0 xvda {tmp_path}/moved")
        assert "done" in sh("xvd mirror 0 xvda --pivot")
        assert "done" in sh(f"xvd backup 0 xvda qcow2:{tmp_path}/one --incremental nightly")
        assert "what has changed" in sh(
            f"xvd backup 0 xvda qcow2:{tmp_path}/two --incremental nightly"
        )
        assert fio.wait(timeout=500) == 0
        seen = sh("blockdev --flushbufs /dev/xvda; md5sum </dev/xvda")
        assert "done" in sh(f"xvd backup 0 xvda qcow2:{tmp_path}/two --incremental nightly")
        sh(f"xvd swap 0 xvda qcow2:{tmp_path}/two; blockdev --flushbufs /dev/xvda")
        assert sh("md5sum </dev/xvda") == seen
    finally:
        disk.detach()
    for image in ("overlay", "one", "two"):
        assert "No errors were found" in sh(f"qemu-img check {tmp_path}/{image}")


@pytest.mark.parametrize(
    ("limit", "load", "figure"),
    [("total_iops_sec=200", "--bs=4k --rw=randrw", "iops"),
     ("write_bytes_sec=4194304", "--bs=64k --rw=write", "bw_bytes")],
    ids=["limited_requests", "limited_bytes"],
)  # fmt: skip
def test_fio_sees_the_limit_of_a_disk_and_of_its_group(
    backend: Backend, attached: Disk, limit: str, load: str, figure: str
) -> None:
    """One process for all guests takes the disk over meanwhile: only such a one has groups."""
    fio = (
        "fio --name=l --filename=/dev/xvda --direct=1 --ioengine=libaio --iodepth=8 --size=32m"
        f" --time_based --runtime=6 --output-format=json {load}"
    )
    name, _, most = limit.partition("=")
    seen = []
    for options, words in (
        ((), f"xvd set --disk 0/xvda {limit}"),
        (
            ("--isolation", "shared"),
            f"xvd group bronze {limit} && xvd set --disk 0/xvda {name}=0 group_name=bronze",
        ),
    ):
        assert backend.stop() == 0
        backend.start(*options)
        sh(words)
        [job] = json.loads(sh(fio))["jobs"]
        seen.append(sum(job[way][figure] for way in ("read", "write")))
    assert backend.stop() == 0
    backend.start()  # the daemon is that of later tests too
    # An emulated host that is busy itself wakes threads late: below the limit is not too fast.
    assert all(0.5 * int(most) < one < 1.05 * int(most) for one in seen), seen


def test_a_disk_on_a_full_file_system_is_held_until_there_is_space(
    backend: Backend, slot: Slot, eventually: Callable[..., None]
) -> None:
    sh("mount -t tmpfs -o size=16m full /mnt/out && truncate -s 64M /mnt/out/disk.img")
    disk = Disk(Path("/mnt/out/disk.img"), slot)
    disk.attach()
    try:
        sh("xvd set --disk 0/xvda on_error=hold")
        write = "dd if=/dev/urandom of=/dev/xvda bs=1M count=32 oflag=direct 2>&1"
        writing = subprocess.Popen(write, shell=True)
        eventually(lambda: "ENOSPC" in sh("xvd stats --json"))
        assert writing.poll() is None
        sh("mount -o remount,size=96m /mnt/out")
        assert writing.wait(timeout=120) == 0
        eventually(lambda: "ENOSPC" not in sh("xvd stats --json"), 60)
    finally:
        sh("xvd set --disk 0/xvda on_error=report")
        disk.detach()
        sh("umount /mnt/out")
