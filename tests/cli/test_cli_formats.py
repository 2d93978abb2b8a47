# SPDX-License-Identifier: Apache-2.0
"""fio verifies a disk of every kind of storage through the ring, as real processes."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ceph import running_cluster
from qemu_img import run_qemu_img
from xvd_process import FourProcesses

pytestmark = [pytest.mark.slow, pytest.mark.tools]

SIZE = 32 << 20
IMAGES = {
    "qcow2": ("-f", "qcow2"),
    "vhdx": ("-f", "vhdx"),
    "vmdk": ("-f", "vmdk"),
    "luks": ("-f", "luks", "-o", "key-secret=k,iter-time=10"),
}
"""How each is made."""
CHECKED = ("qcow2", "vhdx")
"""Those that qemu-img checks."""

Tool = Callable[[str], str]


@pytest.fixture
def image(tmp_path: Path, requires_tool: Tool, request: pytest.FixtureRequest) -> tuple[str, Path]:
    """An image of the kind that is wanted: its URI, and its path."""
    kind: str = request.param
    requires_tool("qemu-storage-daemon")
    img, path, key = requires_tool("qemu-img"), tmp_path / f"disk.{kind}", tmp_path / "key"
    key.write_text("a passphrase")
    words = ["--object", f"secret,id=k,file={key}"] if kind == "luks" else []
    size = [str(SIZE)]
    if kind == "qcow2":
        golden = tmp_path / "golden"
        run_qemu_img(img, "create", "-q", "-f", "qcow2", golden, SIZE)
        words, size = ["-b", str(golden), "-F", "qcow2"], []
    run_qemu_img(img, "create", "-q", *words, *IMAGES[kind], path, *size)
    return f"{kind}:{path}" + (f",key-file={key}" if kind == "luks" else ""), path


def verify(four: FourProcesses, fio: str, output: Path) -> None:
    subprocess.run(
        [fio, "--name=v", "--ioengine=nbd", f"--uri={four.uri}", "--rw=randwrite",
         "--bsrange=4k-64k", "--iodepth=16", f"--size={SIZE}", "--verify=crc32c", "--fsync=32",
         "--verify_fatal=1", "--output-format=json", f"--output={output}"],
        check=True,
        cwd=output.parent,
    )  # fmt: skip
    text = output.read_text()
    assert json.loads(text[text.index("{") :])["jobs"][0]["error"] == 0


@pytest.mark.parametrize("image", IMAGES, indirect=True)
def test_an_image_has_what_fio_verified(
    image: tuple[str, Path], tmp_path: Path, requires_tool: Tool
) -> None:
    uri, path = image
    kind, raw, img = uri.partition(":")[0], tmp_path / "seen.raw", requires_tool("qemu-img")
    with FourProcesses(tmp_path, uri) as four:
        verify(four, requires_tool("fio"), tmp_path / "fio.json")
        subprocess.run([img, "convert", "-f", "raw", "-O", "raw", four.uri, str(raw)], check=True)
        assert four.nbd.stop() == 0
        assert four.backend.stop() == 0

    described = f"driver={kind},file.filename={path}"
    words = ["--image-opts"]
    if kind == "luks":
        words = ["--object", f"secret,id=k,file={tmp_path}/key", "--image-opts"]
        described += ",key-secret=k"
    compared = subprocess.run(
        [img, "compare", *words, described, f"driver=raw,file.filename={raw}"],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert compared.stdout == "Images are identical.\n", compared.stderr
    if kind in CHECKED:
        checked = subprocess.run([img, "check", "-q", "-f", kind, str(path)], check=False)
        assert checked.returncode == 0


@pytest.fixture
def exported(tmp_path: Path) -> Iterator[str]:
    """An NBD export of somebody else's."""
    path, socket = tmp_path / "exported", tmp_path / "exported.sock"
    path.write_bytes(bytes(SIZE))
    words = ["serve", str(path), "--socket", str(socket)]
    with subprocess.Popen(
        [sys.executable, "-m", "xvd.cli", *words], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        server.stdout.readline()
        yield f"nbd+unix:///?socket={socket}"
        server.terminate()


def test_an_nbd_export_has_what_fio_verified(
    exported: str, tmp_path: Path, requires_tool: Tool
) -> None:
    requires_tool("qemu-storage-daemon")
    fio = requires_tool("fio")
    with FourProcesses(tmp_path, exported) as four:
        verify(four, fio, tmp_path / "fio.json")


def test_an_image_of_a_cluster_has_what_fio_verified(tmp_path: Path, requires_tool: Tool) -> None:
    fio = requires_tool("fio")
    with (
        running_cluster(tmp_path / "ceph", requires_tool) as cluster,
        FourProcesses(tmp_path, cluster.image("verified", SIZE)) as four,
    ):
        verify(four, fio, tmp_path / "fio.json")
