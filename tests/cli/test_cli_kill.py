# SPDX-License-Identifier: Apache-2.0
"""SIGKILL under load: the survivor goes on, a successor takes over, nothing flushed is lost."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from xvd_process import Daemon, FourProcesses

pytestmark = [pytest.mark.slow, pytest.mark.tools]

SIZE = 64 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.touch()
    os.truncate(path, SIZE)
    return path


def start_fio(
    four: FourProcesses, fio: str, output: Path, loops: int = 1
) -> subprocess.Popen[bytes]:
    """Random writes, flushed now and then, verified at the end."""
    return subprocess.Popen(
        [fio, "--name=v", "--ioengine=nbd", f"--uri={four.uri}", "--rw=randwrite", "--bs=4k",
         "--iodepth=32", f"--size={SIZE}", "--verify=crc32c", "--fsync=64", "--rate_iops=4000",
         "--output-format=json", f"--output={output}", f"--loops={loops}"],
        stdout=subprocess.DEVNULL,
        cwd=output.parent,  # where fio puts its state
    )  # fmt: skip


def writes(four: FourProcesses) -> int:
    """Writes that the present backend has served."""
    disks = json.loads(four.run("stats", "--json").stdout)["backend-0"]
    return sum(disk["counters"].get("wr_req", 0) for disk in disks)


def in_qcow2(image: Path, qemu_img: str) -> str:
    path = image.with_suffix(".qcow2")
    subprocess.run([qemu_img, "create", "-q", "-f", "qcow2", str(path), str(SIZE)], check=True)
    return f"qcow2:{path}"


@pytest.mark.parametrize(
    ("options", "formatted"),
    [((), False), (("--copy",), False), ((), True)],
    ids=["mapping", "copy", "qcow2"],
)
def test_backend_killed_under_fio(
    tmp_path: Path, image: Path, requires_tool, options: tuple[str, ...], formatted: bool
) -> None:
    fio = requires_tool("fio")
    output = tmp_path / "fio.json"
    storage = in_qcow2(image, requires_tool("qemu-img")) if formatted else str(image)
    with FourProcesses(tmp_path, storage, *options) as four:
        load = start_fio(four, fio, output)

        for _ in range(3):
            while writes(four) < 300:  # until it is under load
                assert load.poll() is None
            four.backend.kill()
            four.start_backend()

        assert load.wait(120) == 0
        assert four.nbd.process.poll() is None
        text = output.read_text()
        assert json.loads(text[text.index("{") :])["jobs"][0]["error"] == 0


def begin(four: FourProcesses, *words: str) -> subprocess.Popen[bytes]:
    """A verb on the host, which may end in any way."""
    command = [sys.executable, "-m", "xvd.cli", *words, "--host", str(four.directory)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def target(four: FourProcesses) -> str:
    return str(json.loads(four.run("list", "--json").stdout)[0]["target"])


def test_backend_killed_while_it_exchanges_storage(
    tmp_path: Path, image: Path, requires_tool
) -> None:
    output = tmp_path / "fio.json"
    decided = tmp_path / "host/state/backend-0"
    here, there = image, tmp_path / "other.img"
    with FourProcesses(tmp_path, here) as four:
        load = start_fio(four, requires_tool("fio"), output, loops=2)
        for moment in ("before", "decided", "after"):
            while writes(four) < 100:
                assert load.poll() is None
            assert four.run("pause", "1", "xvda").returncode == 0
            shutil.copyfile(here, there)
            swapping = begin(four, "swap", "1", "xvda", str(there))
            while moment == "decided" and not any(
                there.name in kept.read_text() for kept in decided.rglob("*.decided")
            ):
                assert swapping.poll() in (None, 0)
            if moment == "after":
                assert swapping.wait(60) == 0
            four.backend.kill()
            swapping.wait(60)
            four.start_backend()
            if target(four) != str(there):
                assert four.run("swap", "1", "xvda", str(there)).returncode == 0
            assert four.run("resume", "1", "xvda").returncode == 0
            here, there = there, here

        assert load.wait(120) == 0
        text = output.read_text()
        assert json.loads(text[text.index("{") :])["jobs"][0]["error"] == 0


WRITER = """
import os, struct
h.connect_uri(os.environ["uri"])
n = 0
while True:
    block = n % 4096
    h.pwrite(struct.pack("<Q", n) * 512, block * 4096)
    if n % 16 == 15:
        h.flush()
        os.write(1, b"%d\\n" % n)
    n += 1
"""


def test_frontend_killed_under_load_loses_nothing_that_was_flushed(
    tmp_path: Path, image: Path, requires_tool
) -> None:
    nbdsh = requires_tool("nbdsh")
    with FourProcesses(tmp_path, image) as four:
        writer = subprocess.Popen(
            [nbdsh, "-c", WRITER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={"PATH": "/usr/bin:/bin", "uri": four.uri}, text=True,  # the system's Python
        )  # fmt: skip
        assert writer.stdout is not None
        flushed = -1
        for line in writer.stdout:
            flushed = int(line)
            if flushed > 2000:
                four.nbd.kill()
                break
        rest, _ = writer.communicate()  # what it had flushed before it noticed
        flushed = max([flushed, *map(int, rest.split())])
        assert four.backend.process.poll() is None

        four.start_nbd()
        data = tmp_path / "back.img"
        subprocess.run(["nbdcopy", four.uri, str(data)], check=True)

    content = data.read_bytes()
    for n in range(max(0, flushed - 4095), flushed + 1):
        at = n % 4096 * 4096
        assert int.from_bytes(content[at : at + 8], "little") >= n, f"write {n} is lost"


def test_host_killed_ends_everybody(tmp_path: Path, image: Path) -> None:
    with FourProcesses(tmp_path, image) as four:
        four.host.kill()

        ends = [threading.Thread(target=d.process.wait) for d in (four.backend, four.nbd)]
        for end in ends:
            end.start()
            end.join(30)

        assert four.backend.process.returncode == 1
        assert four.nbd.process.returncode == 1


def test_what_a_killed_serve_has_left_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with Daemon("serve", "null:1M"), Daemon("serve", "null:1M") as killed:
        killed.kill()
        assert len(list(tmp_path.iterdir())) == 2

        with Daemon("serve", "null:1M") as next_one:
            assert len(list(tmp_path.iterdir())) == 2
            assert next_one.stop() == 0

        assert len(list(tmp_path.iterdir())) == 1
