# SPDX-License-Identifier: Apache-2.0
"""Bad input: one line that names the thing and the remedy, the documented status, nothing left."""

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from xvd_process import Daemon, FourProcesses, run_xvd

pytestmark = pytest.mark.slow


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.touch()
    os.truncate(path, 1 << 20)
    return path


def check(result, status: int, *words: str) -> None:
    assert result.returncode == status, result.stderr
    assert re.fullmatch(r"xvd: [^\n]+\n", result.stderr), result.stderr
    for word in words:
        assert word in result.stderr


def test_missing_image(tmp_path: Path) -> None:
    result = run_xvd("serve", str(tmp_path / "none.img"), "--run", "true")

    check(result, 1, "none.img", "truncate -s 1G")
    assert list(tmp_path.iterdir()) == []


def test_directory_as_image(tmp_path: Path) -> None:
    check(run_xvd("serve", str(tmp_path), "--run", "true"), 1, str(tmp_path), "directory")


def test_image_of_an_odd_size(image: Path) -> None:
    os.truncate(image, 1000)

    result = run_xvd("serve", str(image), "--run", "true")

    check(result, 1, "1000 bytes", "truncate -s 1024")
    assert image.stat().st_size == 1000


def test_empty_image(image: Path) -> None:
    os.truncate(image, 0)

    check(run_xvd("serve", str(image), "--run", "true"), 1, "empty", "truncate")


def test_image_in_use(image: Path) -> None:
    with Daemon("serve", str(image)):
        check(run_xvd("serve", str(image), "--run", "true"), 1, "in use", "stop that one")


def test_unknown_uri() -> None:
    check(run_xvd("serve", "ftp:nowhere", "--run", "true"), 2, "ftp:nowhere", "file:")


def test_bad_size() -> None:
    check(run_xvd("serve", "memory:lots", "--run", "true"), 2, "lots", "K, M, G")


def test_unknown_layer(image: Path) -> None:
    result = run_xvd("serve", str(image), "--layer", "shred", "--run", "true")

    check(result, 2, "shred", "delay")


@pytest.fixture
def unwritable(image: Path) -> Iterator[Path]:
    """An image that we may read and not write; root needs an immutable file for that."""
    if os.geteuid() != 0:
        image.chmod(0o400)
        yield image
        return
    subprocess.run(["chattr", "+i", str(image)], check=True)
    yield image
    subprocess.run(["chattr", "-i", str(image)], check=True)


def test_read_only_file_opened_for_writing(unwritable: Path) -> None:
    result = run_xvd("serve", str(unwritable), "--run", "true")

    check(result, 1, str(unwritable), "no permission", "read-only (-r)")


def test_read_only_file_served_read_only(unwritable: Path) -> None:
    result = run_xvd("serve", "-r", str(unwritable), "--run", "true")

    assert result.returncode == 0, result.stderr


def test_socket_in_use(image: Path, tmp_path: Path) -> None:
    socket = tmp_path / "nbd.sock"
    with Daemon("serve", "null:1M", "--socket", str(socket)):
        result = run_xvd("serve", str(image), "--socket", str(socket), "--run", "true")

    check(result, 2, str(socket))


def test_a_socket_that_is_a_file_stays(image: Path, tmp_path: Path) -> None:
    where = tmp_path / "important"
    where.write_text("data")

    result = run_xvd("serve", str(image), "--socket", str(where), "--run", "true")

    check(result, 2, str(where))
    assert where.read_text() == "data"


def test_bad_address(image: Path) -> None:
    check(run_xvd("serve", str(image), "--tcp", "nowhere", "--run", "true"), 2, "HOST:PORT")


def test_bad_xl_string(tmp_path: Path) -> None:
    host = str(tmp_path)
    check(run_xvd("attach", "1", "vdev=xvda,colour=red,target=x", "--host", host), 2, "colour")
    check(run_xvd("attach", "1", "vdev=nonsense,target=x", "--host", host), 2, "nonsense")
    check(run_xvd("attach", "1", "target=x", "--host", host), 2, "vdev")


def test_no_host(tmp_path: Path) -> None:
    for verb in (["list"], ["attach", "1", "vdev=xvda,target=x"], ["detach", "1", "xvda"],
                 ["nbd", "1", "xvda"], ["backend"], ["stats"]):  # fmt: skip
        check(run_xvd(*verb, "--host", str(tmp_path)), 1, str(tmp_path))


def test_attach_without_a_backend_leaves_nothing(tmp_path: Path) -> None:
    host = str(tmp_path / "h")
    with Daemon("host", host):
        disk = "vdev=xvda,target=null:1M"
        result = run_xvd("attach", "1", disk, "--host", host, "--timeout", "0.2")

        check(result, 1, "1/xvda", "xvd backend")
        assert run_xvd("list", "--json", "--host", host).stdout == "[]\n"


def test_attach_of_what_the_backend_cannot_open(tmp_path: Path) -> None:
    host = str(tmp_path / "h")
    with Daemon("host", host), Daemon("backend", "--host", host):
        disk = f"vdev=xvda,target={tmp_path}/none.img"
        result = run_xvd("attach", "1", disk, "--host", host)

        check(result, 1, "1/xvda", "none.img", "no such image")
        assert run_xvd("list", "--json", "--host", host).stdout == "[]\n"


def test_a_second_host_in_the_same_directory(tmp_path: Path) -> None:
    host = str(tmp_path / "h")
    with Daemon("host", host):
        check(run_xvd("host", host), 2, "answers there already")


def test_detach_of_no_disk(tmp_path: Path) -> None:
    host = str(tmp_path / "h")
    with Daemon("host", host):
        check(run_xvd("detach", "1", "xvda", "--host", host), 2, "no such disk", "xvd list")


def test_wrong_usage_is_status_2() -> None:
    result = run_xvd("serve")

    assert result.returncode == 2


@pytest.fixture
def full(tmp_path: Path) -> Iterator[list[str]]:
    """A disk whose storage has no room: what to serve, as arguments."""
    image = tmp_path / "small" / "disk.img"
    image.parent.mkdir()
    mounted = os.geteuid() == 0
    if mounted:
        mount = ["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(image.parent)]
        subprocess.run(mount, check=True)
    image.touch()
    os.truncate(image, 16 << 20)
    try:
        yield [str(image)] if mounted else [str(image), "--layer", "error:one_in=1,errno=ENOSPC"]
    finally:
        if mounted:
            subprocess.run(["umount", str(image.parent)], check=True)


def test_disk_full_while_writing(full: list[str], requires_tool: Callable[[str], str]) -> None:
    qemu_io = requires_tool("qemu-io")

    result = run_xvd("serve", *full, "--run", f'{qemu_io} -f raw -c "write 4M 4M" "$uri"')

    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("xvd: ")]
    assert len(lines) == 1
    assert "No space left on device" in lines[0]
    assert "free some space" in lines[0]


# ---- Storage that is not what it was said to be ----


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    """Bytes that begin as a qcow2 image does, and no whole number of sectors."""
    path = tmp_path / "disk.qcow2"
    path.write_bytes(b"QFI\xfb\0\0\0\3" + bytes(196_000))
    return path


def test_an_image_of_another_format(qcow2: Path) -> None:
    result = run_xvd("serve", str(qcow2), "--run", "echo served")

    check(result, 1, f"raw:{qcow2}", "begins or ends as a qcow2 image", "qemu-img convert -f qcow2")
    assert "truncate" not in result.stderr
    assert result.stdout == ""


def test_an_image_that_is_raw_because_the_user_says_so(qcow2: Path) -> None:
    os.truncate(qcow2, 1 << 20)

    for words in (("--format", "raw", str(qcow2)), (f"raw:{qcow2}",)):
        result = run_xvd("serve", *words, "--run", "echo served")

        assert (result.returncode, result.stdout, result.stderr) == (0, "served\n", "")


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("qcow2", 1, "Image is not in qcow2 format"),
        ("vhdx", 1, "Could not open"),
        ("luks", 2, "where is its passphrase? write luks:PATH,key-file=PATH"),
        ("vdi5", 2, "unknown storage"),
    ],
)
def test_an_image_that_is_not_of_the_format_that_is_named(
    image: Path, name: str, status: int, said: str
) -> None:
    result = run_xvd("serve", "--format", name, str(image), "--run", "echo served")

    check(result, status, str(image), said)
    assert result.stdout == ""


@pytest.mark.parametrize("uri", ["null:8192P", "memory:16384P", "null:18014398509481984s"])
def test_a_size_that_no_offset_reaches(uri: str) -> None:
    result = run_xvd("serve", uri, "--run", "echo served")

    check(result, 2, "is too large; no disk has more than 9223372036854775296 bytes")
    assert result.stdout == ""


def test_memory_that_cannot_be_had() -> None:
    check(run_xvd("serve", "memory:4096P", "--run", "true"), 1, "no address space", "a smaller one")


def test_disks_that_a_daemon_refuses(tmp_path: Path, image: Path, qcow2: Path) -> None:
    with FourProcesses(tmp_path, image) as four:
        for disk, status, words in (
            (f"vdev=xvdb,target={image}", 1, "in use by this daemon's disk 1/xvda; detach that"),
            (f"vdev=xvdb,target={qcow2}", 1, "begins or ends as a qcow2 image"),
            (f"format=qcow2,vdev=xvdb,target={qcow2}", 1, "Unsupported cluster size"),
            (f"format=vhd,vdev=xvdb,target={image}", 1, "cannot open"),
        ):
            result = four.run("attach", "1", disk)
            check(result, status, "1/xvdb", words)
            assert result.stdout == ""
        os.truncate(qcow2, 1 << 20)
        result = four.run("attach", "1", f"format=raw,vdev=xvdb,target={qcow2}")
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_disk_shrinks_with_its_image_only_if_it_is_told(tmp_path: Path, image: Path) -> None:
    with FourProcesses(tmp_path, image) as four:
        os.truncate(image, 1 << 19)
        refused = four.run("resize", "1", "xvda")
        check(refused, 1, "its storage has 1024 sectors, the disk 2048; see --shrink")
        assert refused.stdout == ""

        done = four.run("resize", "1", "xvda", "--shrink")

        assert (done.returncode, done.stdout, done.stderr) == (0, "524288\n", "")
        check(four.run("resize", "1", "xvda", "8192P"), 2, "is too large")
