# SPDX-License-Identifier: Apache-2.0
"""Our frontend uses disks of dom0's own that Linux's xen-blkback and QEMU serve.

No backend of ours runs here, and no xen-blkfront: dom0 is attached to itself.
"""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from xen_host import ON_ARM, negotiated, report, sh

SIZE = 256 << 20
COPY_BOTH_WAYS = 'nbdcopy {data} "$uri" && nbdcopy "$uri" - | cmp -n {size} - {data}'
VERIFY = (
    'fio --name=v --ioengine=nbd --uri="$uri" --iodepth=16 --rw=randrw --bsrange=4k-128k'
    " --size=16m --verify=crc32c --verify_fatal=1"
)
DETACH = "xl block-detach 0 xvda"
"""While our frontend runs, which closes then. Without one xen-blkback never lets a disk go: nobody
answers its closing, as in a guest that has no driver."""


@dataclass(frozen=True)
class Peer:
    """A backend of somebody else's: how it is told to serve a disk to dom0."""

    name: str
    line: str


def qemu_of_dom0() -> None:
    """The QEMU that serves dom0's own qdisks; libxl of 4.17 wants to find its process."""
    sh(
        "[ -e /run/qemu-dom0.pid ] && kill -0 $(cat /run/qemu-dom0.pid) ||"
        " /usr/libexec/xen-qemu-system-i386 -xen-domid 0 -xen-attach -name dom0 -nographic -M xenpv"
        " -nic none -daemonize -monitor none -serial none -parallel none"
        " -pidfile /run/qemu-dom0.pid;"
        " xenstore-write /local/domain/0/image/device-model-pid $(cat /run/qemu-dom0.pid)"
    )


@pytest.fixture(scope="module", autouse=True)
def kernel_modules() -> Iterator[None]:
    """Linux's backend instead of ours, and nobody else's frontend."""
    if ON_ARM and subprocess.run(["modprobe", "-nq", "xen-blkback"], check=False).returncode:
        pytest.skip("the rig's kernel of 64 KiB pages has no xen-blkback")
    sh("modprobe -r xen-blkfront; modprobe xen-blkback; modprobe loop; ulimit -l unlimited")
    yield
    sh("modprobe -r null_blk xen-blkback; rm -f /tmp/front.img; modprobe xen-blkfront")


@pytest.fixture(params=["null_blk", "loop", "qdisk"])
def peer(request: pytest.FixtureRequest) -> Iterator[Peer]:
    if request.param == "qdisk" and ON_ARM:
        pytest.skip("Debian has QEMU's Xen disk for x86 only")
    if request.param == "null_blk":
        sh("modprobe -r null_blk; modprobe null_blk gb=1 memory_backed=1 nr_devices=1")
        yield Peer("xen-blkback on null_blk", "phy:/dev/nullb0,xvda,w")
        sh("modprobe -r null_blk")
        return
    image = Path("/tmp/front.img")
    with image.open("wb") as file:
        file.truncate(SIZE)
    if request.param == "qdisk":
        qemu_of_dom0()
        line = f"format=raw,vdev=xvda,access=rw,backendtype=qdisk,target={image}"
        yield Peer("QEMU's qdisk", line)
    else:
        device = sh(f"losetup -f --show {image}").strip()
        yield Peer("xen-blkback on a loop device", f"phy:{device},xvda,w")
        sh(f"losetup -d {device}")
    image.unlink()


@pytest.fixture
def attached(peer: Peer) -> Iterator[Peer]:
    sh(f"xl block-attach 0 '{peer.line}'")
    yield peer
    if "51712" in sh("xl block-list 0"):
        subprocess.run(["xl", "block-detach", "-f", "0", "xvda"], check=False, capture_output=True)


@pytest.fixture
def data() -> Iterator[Path]:
    path = Path("/tmp/data")
    sh(f"head -c {SIZE} /dev/urandom > {path}")
    yield path
    path.unlink()


def test_256_mib_are_the_same_both_ways_and_fio_verifies(attached: Peer, data: Path) -> None:
    script = COPY_BOTH_WAYS.format(data=data, size=SIZE)
    sh(f"xvd nbd 0 xvda --run '{script} && {VERIFY} 2>&1 && {DETACH} 2>&1'")
    assert "51712" not in sh("xl block-list 0")


def test_both_ends_publish_what_they_agreed_on(attached: Peer) -> None:
    command = ["xvd", "nbd", "0", "xvda"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as nbd:
        assert nbd.stdout is not None
        assert nbd.stderr is not None
        assert nbd.stdout.readline().startswith("nbd+unix://")
        table = negotiated(0)
        sh(DETACH)
        assert nbd.wait(30) == 1
        assert "was removed" in nbd.stderr.read()
    report(f"xvd's frontend with {attached.name}", table)
    assert table["state"] == ("4", "4")


# feature_persistent, max_ring_page_order, max_queues of xen-blkback; persistent of our own
SWEEP = [(1, 4, 2, 1), (1, 0, 1, 1), (0, 4, 1, 1), (1, 2, 2, 0)]


@pytest.mark.parametrize(("persistent", "order", "queues", "ours"), SWEEP)
@pytest.mark.parametrize("peer", ["loop"], indirect=True)
def test_xen_blkback_with_its_parameters_swept(
    peer: Peer, persistent: int, order: int, queues: int, ours: int
) -> None:
    parameters = f"max_ring_page_order={order} max_queues={queues} feature_persistent={persistent}"
    sh(f"modprobe -r xen-blkback && modprobe xen-blkback {parameters}")
    sh(f"xl block-attach 0 '{peer.line}'")
    wishes = f"--set max_ring_page_order=4 --set max_queues=2 --set feature_persistent={ours}"
    found = "xenstore-ls -f /local/domain/0/device/vbd/51712 > /tmp/found"
    sh(f"xvd nbd 0 xvda {wishes} --run '{found} && {VERIFY} 2>&1 && {DETACH} 2>&1'")
    lines = (line.partition(" = ") for line in Path("/tmp/found").read_text().splitlines())
    node = {path.rpartition("/")[2]: value.strip('"') for path, _, value in lines}
    report(
        f"xvd's frontend with xen-blkback of {parameters}", {k: (v, "") for k, v in node.items()}
    )
    assert int(node.get("ring-page-order", "0")) == order
    assert int(node.get("multi-queue-num-queues", "1")) == queues
    assert int(node["feature-persistent"]) == ours


@pytest.mark.parametrize("segments", [0, 32])
@pytest.mark.parametrize("page_size", [16384, 65536])
@pytest.mark.parametrize("peer", ["loop"], indirect=True)
def test_xen_blkback_serves_a_frontend_of_larger_pages(
    attached: Peer, page_size: int, segments: int
) -> None:
    """Requests are those of a guest with such pages; without indirect ones 64 KiB need two."""
    wishes = f"--set page_size={page_size} --set max_indirect_segments={segments}"
    sh(f"xvd nbd 0 xvda {wishes} --run '{VERIFY} 2>&1 && {DETACH} 2>&1'")


@pytest.mark.parametrize("peer", ["null_blk"], indirect=True)
def test_a_backend_that_is_unloaded_gives_errors_and_no_hang(attached: Peer) -> None:
    """As long as a disk is served the module cannot be unloaded, so the driver leaves it first.

    It leaves its state at Connected then: nothing tells us but that requests are not answered.
    """
    unload = "echo vbd-0-51712 > /sys/bus/xen-backend/drivers/vbd/unbind && modprobe -r xen-blkback"
    read = 'fio --name=r --ioengine=nbd --uri="$uri" --rw=read --bs=4k --size=4k'
    script = f"{read} && {unload} && ! {read}"
    try:
        command = ["xvd", "nbd", "0", "xvda", "--set", "answer_timeout=8", "--run", script]
        done = subprocess.run(command, check=False, timeout=100, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "io_u error" in done.stdout + done.stderr
    finally:
        # It finds a frontend that is gone, and leaves a node that says so.
        sh("modprobe xen-blkback; xenstore-rm error || true")
