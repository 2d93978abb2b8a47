# SPDX-License-Identifier: Apache-2.0
"""Mirrors and backups by the command line, of disks that are in use."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from xvd_process import FourProcesses

pytestmark = [pytest.mark.slow, pytest.mark.tools]

SIZE = 64 << 20
KILLS = int(os.environ.get("XVD_KILLS", "5"))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE // 4))
    os.truncate(path, SIZE)
    return path


@pytest.fixture
def four(tmp_path: Path, image: Path) -> Iterator[FourProcesses]:
    with FourProcesses(tmp_path, image) as processes:
        yield processes


def start_fio(four: FourProcesses, fio: str, output: Path, *more: str) -> subprocess.Popen[bytes]:
    """Random writes, flushed now and then."""
    return subprocess.Popen(
        [fio, "--name=w", "--ioengine=nbd", f"--uri={four.uri}", "--rw=randwrite", "--bs=4k",
         "--iodepth=32", f"--size={SIZE}", "--fsync=64", "--output-format=json",
         f"--output={output}", *more],
        stdout=subprocess.DEVNULL,
        cwd=output.parent,
    )  # fmt: skip


def errors(output: Path) -> int:
    text = output.read_text()
    return int(json.loads(text[text.index("{") :])["jobs"][0]["error"])


def test_a_disk_moves_to_other_storage_under_load(
    four: FourProcesses, image: Path, tmp_path: Path, requires_tool: Callable[[str], str]
) -> None:
    other, output = tmp_path / "other.qcow2", tmp_path / "fio.json"
    requires_tool("qemu-storage-daemon")
    fio = requires_tool("fio")
    load = start_fio(four, fio, output, "--verify=crc32c", "--rate_iops=8000", "--loops=2")

    mirrored = four.run("mirror", "1", "xvda", f"qcow2:{other}")
    info = json.loads(four.run("disk", "info", "1", "xvda", "--json").stdout)
    refused = four.run("swap", "1", "xvda", str(image))
    moved = four.run("mirror", "1", "xvda", "--pivot")

    assert load.wait(120) == 0
    assert errors(output) == 0
    assert (mirrored.returncode, mirrored.stdout, mirrored.stderr) == (
        0, f"everything is mirrored to qcow2:{other}: ready\n", ""
    )  # fmt: skip
    assert (info["copy"]["phase"], info["image"]) == ("ready", str(image))
    assert (refused.returncode, refused.stderr) == (
        1,
        f"xvd: 1/xvda: it is being copied to qcow2:{other}; wait for that, or give it up: "
        "xvd mirror --cancel\n",
    )
    assert (moved.returncode, moved.stdout, moved.stderr) == (
        0, f"everything is mirrored to qcow2:{other}: done\n", ""
    )  # fmt: skip
    assert json.loads(four.run("list", "--json").stdout)[0]["target"] == f"qcow2:{other}"
    assert four.nbd.stop() == 0
    assert four.backend.stop() == 0
    checked = subprocess.run(["qemu-img", "check", "-q", str(other)], check=False)
    assert checked.returncode == 0


def test_a_backup_and_what_has_changed_since(
    four: FourProcesses, image: Path, tmp_path: Path, requires_tool: Callable[[str], str]
) -> None:
    requires_tool("qemu-storage-daemon")
    qemu_io, qemu_img = requires_tool("qemu-io"), requires_tool("qemu-img")
    days = [tmp_path / f"day{n}.qcow2" for n in range(2)]
    said, info = [], {}
    for day in days:
        command = [qemu_io, "-f", "raw", "-c", f"write -P {len(said) + 1} 1M 64k", four.uri]
        subprocess.run(command, check=True, capture_output=True)
        done = four.run("backup", "1", "xvda", f"qcow2:{day}", "--incremental", "nightly")
        said.append((done.returncode, done.stdout, done.stderr))
        info = json.loads(four.run("disk", "info", "1", "xvda", "--json").stdout)
    elsewhere = four.run("backup", "1", "xvda", str(image), "--incremental", "nightly")
    raw = four.run("backup", "1", "xvda", str(tmp_path / "new"), "--incremental", "nightly")
    none = four.run("backup", "1", "xvda", "--cancel")
    forgotten = four.run("backup", "1", "xvda", "--forget", "nightly")
    unknown = four.run("backup", "1", "xvda", "--forget", "nightly")

    assert said == [
        (0, f"everything is written to qcow2:{days[0]}: done\n", ""),
        (0, f"what has changed is written to qcow2:{days[1]}: done\n", ""),
    ]
    assert {day.stat().st_mode & 0o777 for day in days} == {0o600}
    assert (info["copy"]["copied"], info["backups"]["nightly"]["changed"]) == (1 << 16, 0)
    compared = [qemu_img, "compare", "-f", "qcow2", "-F", "raw", str(days[1]), str(image)]
    assert subprocess.run(compared, check=False, capture_output=True).returncode == 0
    assert (elsewhere.returncode, elsewhere.stderr) == (
        1,
        f"xvd: what has changed since qcow2:{days[1]} goes into a new image (qcow2:PATH), or over "
        f"qcow2:{days[1]}; {image} is neither\n",
    )
    assert "cannot have" in raw.stderr
    assert (none.returncode, none.stderr) == (1, "xvd: 1/xvda: no copy of it is being made\n")
    assert (forgotten.returncode, forgotten.stdout, forgotten.stderr) == (0, "", "")
    assert (unknown.returncode, unknown.stderr) == (
        1, "xvd: there is no backup 'nightly' to forget; there are: none\n"
    )  # fmt: skip


def changed_in(image: Path, socket: Path, qemu_nbd: str, nbdinfo: str) -> list[tuple[int, int]]:
    """The offsets and lengths that lie in the first image of a chain, as NBD tells."""
    asked = [nbdinfo, "--map=qemu:allocation-depth", "--json", f"nbd+unix:///?socket={socket}"]
    words = [qemu_nbd, "-r", "-A", "-f", "qcow2", "-k", str(socket), str(image)]
    with subprocess.Popen(words) as server:
        while not socket.exists():
            assert server.poll() is None
        told = subprocess.run(asked, check=True, capture_output=True, text=True)
    return [(e["offset"], e["length"]) for e in json.loads(told.stdout) if e["type"] == 1]


def test_a_backup_tool_sees_over_nbd_what_has_changed(
    four: FourProcesses, tmp_path: Path, requires_tool: Callable[[str], str]
) -> None:
    requires_tool("qemu-storage-daemon")
    qemu_io, qemu_nbd, nbdinfo = map(requires_tool, ("qemu-io", "qemu-nbd", "nbdinfo"))
    days = [tmp_path / f"day{n}.qcow2" for n in range(2)]
    for day in days:
        command = [qemu_io, "-f", "raw", "-c", "write -P 9 3M 128k", four.uri]
        subprocess.run(command, check=True, capture_output=True)
        words = ("backup", "1", "xvda", f"qcow2:{day}", "--incremental", "nightly")
        assert four.run(*words).returncode == 0

    changed = changed_in(days[1], tmp_path / "sock", qemu_nbd, nbdinfo)

    assert changed == [(3 << 20, 128 << 10)]


def test_what_has_changed_is_known_after_any_number_of_kills(
    four: FourProcesses, image: Path, tmp_path: Path, requires_tool: Callable[[str], str]
) -> None:
    fio, copy, output = requires_tool("fio"), tmp_path / "copy.img", tmp_path / "fio.json"
    assert four.run("backup", "1", "xvda", str(copy), "--incremental", "n").returncode == 0
    load = start_fio(four, fio, output, "--rate_iops=500", "--time_based", f"--runtime={KILLS}")

    for _ in range(KILLS):
        four.backend.kill()
        four.start_backend()
    assert load.wait(120) == 0
    done = four.run("backup", "1", "xvda", str(copy), "--incremental", "n", "--json")

    figures = [json.loads(line) for line in done.stdout.splitlines()]
    assert (errors(output), done.returncode, done.stderr) == (0, 0, "")
    assert (figures[-1]["phase"], figures[-1]["incremental"]) == ("done", True)
    assert copy.read_bytes() == image.read_bytes()


def test_a_mirror_that_cannot_be_says_why(four: FourProcesses, tmp_path: Path) -> None:
    small = tmp_path / "small.img"
    small.write_bytes(bytes(4096))

    refused = four.run("mirror", "1", "xvda", str(small))
    lost = four.run("mirror", "1", "xvda", str(tmp_path / "no" / "b.img"))
    nowhere = four.run("backup", "1", "xvda", "--incremental", "nightly")
    both = four.run("mirror", "1", "xvda", str(small), "--cancel")
    none = four.run("mirror", "1", "xvda")

    assert (refused.returncode, refused.stderr) == (
        1, f"xvd: 1/xvda: {small} does not fit: it has 4096 bytes and the disk {SIZE}\n"
    )  # fmt: skip
    assert (lost.returncode, lost.stderr) == (
        1, f"xvd: {tmp_path}/no/b.img: No such file or directory\n"
    )  # fmt: skip
    assert (nowhere.returncode, nowhere.stderr) == (2, "xvd: --incremental: where to? name it\n")
    assert (both.returncode, both.stderr) == (2, "xvd: --cancel goes with nothing else\n")
    assert (none.returncode, none.stdout) == (0, "no copy has been made\n")


def test_a_disk_is_told_about(four: FourProcesses, image: Path, tmp_path: Path) -> None:
    assert four.run("backup", "1", "xvda", str(tmp_path / "copy.img")).returncode == 0
    shown = four.run("disk", "info", "1", "xvda")
    lines = dict(line.split(maxsplit=1) for line in shown.stdout.splitlines())

    assert (shown.returncode, shown.stderr) == (0, "")
    assert (lines["disk"], lines["image"], lines["paused"]) == ("1/xvda", str(image), "no")
    assert lines["storage.size"] == str(SIZE)
    assert (lines["copy.left"], lines["storage.read_only"]) == ("0", "no")
    assert (lines["trouble"], "storage.engine" in lines) == ("-", False)
