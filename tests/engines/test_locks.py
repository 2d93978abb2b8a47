# SPDX-License-Identifier: Apache-2.0
"""One writer, or any number of readers, of us and of QEMU alike."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rig_engines import image

from xvd.engines import locks
from xvd.engines.image import FileEngine
from xvd.engines.uri import open_engine
from xvd.errors import EngineError

Tool = Callable[[str], str]


@contextmanager
def opened_by_qemu(requires_tool: Tool, path: Path, *options: str) -> Iterator[None]:
    """A tool of QEMU's that has the image open."""
    command = [requires_tool("qemu-io"), *options, "-f", "raw", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"length\n")
        process.stdin.flush()
        while b"MiB" not in process.stdout.readline():
            pass
        yield
        process.stdin.close()
        process.stdout.read()


@contextmanager
def opened_by_another(path: Path, *, read_only: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    """Another process of ours that has the image open."""
    program = (
        "import sys; from xvd.engines.image import FileEngine; "
        f"engine = FileEngine(sys.argv[1], read_only={read_only}); "
        "print('open', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        yield process
        process.kill()


def refused(path: Path, text: str, *, read_only: bool = False) -> None:
    with pytest.raises(EngineError, match=text) as caught:
        FileEngine(str(path), read_only=read_only)
    assert (caught.value.errno, caught.value.filename) == (errno.EBUSY, str(path))


@pytest.mark.slow
@pytest.mark.parametrize("ours", [False, True], ids=["to write", "to read"])
def test_what_another_process_writes_to_is_not_opened(tmp_path: Path, ours: bool) -> None:
    path = image(tmp_path)
    with opened_by_another(path):
        refused(path, "in use by another process; stop that one first", read_only=ours)


@pytest.mark.slow
def test_what_another_process_reads_may_be_read(tmp_path: Path) -> None:
    path = image(tmp_path)
    with opened_by_another(path, read_only=True):
        FileEngine(str(path), read_only=True).close()
        refused(path, "in use by another process")


@pytest.mark.parametrize("ours", [False, True], ids=["to write", "to read"])
def test_what_qemu_writes_to_is_not_opened(tmp_path: Path, requires_tool: Tool, ours: bool) -> None:
    path = image(tmp_path)
    with opened_by_qemu(requires_tool, path):
        refused(path, r"a QEMU or one like it \(its lock for 'write'\)", read_only=ours)
    FileEngine(str(path), read_only=ours).close()


def test_what_qemu_reads_may_be_read(tmp_path: Path, requires_tool: Tool) -> None:
    path = image(tmp_path)
    with opened_by_qemu(requires_tool, path, "-r"):
        FileEngine(str(path), read_only=True).close()


@pytest.mark.parametrize(
    ("ours", "options", "status"),
    [
        ("write", ("info", "-U"), 0),
        ("write", ("bench", "-w", "-c", "1", "-f", "raw"), 1),
        ("write", ("resize", "-f", "raw"), 1),
        ("read", ("info",), 0),
        ("read", ("resize", "-f", "raw"), 1),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_qemus_tools_see_us_as_they_see_a_qemu(
    tmp_path: Path, requires_tool: Tool, ours: str, options: tuple[str, ...], status: int
) -> None:
    path = image(tmp_path)
    engine = FileEngine(str(path), read_only=ours == "read")
    size = ["2M"] if "resize" in options else []
    command = [requires_tool("qemu-img"), *options, str(path), *size]

    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)

    assert done.returncode == status, done.stderr
    assert ("lock" in done.stderr) == (status == 1)
    engine.close()


@pytest.mark.slow
def test_a_successor_waits_for_a_predecessor_that_is_killed(tmp_path: Path) -> None:
    path = image(tmp_path)
    with opened_by_another(path) as process:
        killer = threading.Timer(0.2, process.send_signal, (signal.SIGKILL,))
        killer.start()
        FileEngine(str(path), patience_s=30.0).close()
        killer.join()


def test_who_of_this_daemon_has_an_image_is_said(tmp_path: Path) -> None:
    path = image(tmp_path)
    engine = open_engine(str(path), user="1/xvda")
    link = tmp_path / "link.img"
    link.symlink_to(path)

    with pytest.raises(EngineError, match="in use by this daemon's disk 1/xvda; detach that one"):
        open_engine(str(link), user="2/xvda")

    engine.close()
    open_engine(str(link), user="2/xvda").close()


def test_readers_of_one_daemon_are_forgotten_one_by_one(tmp_path: Path) -> None:
    path = str(image(tmp_path))
    first = FileEngine(path, read_only=True, user="1/xvda")
    second = FileEngine(path, read_only=True, user="2/xvda")
    first.close()

    with pytest.raises(EngineError, match="this daemon's disk 2/xvda"):
        FileEngine(path)
    second.close()


def test_a_file_system_without_locks_is_told_once(
    tmp_path: Path, expect_log: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None can be had here: what stands for it says what NFS without a lock daemon does."""
    expect_log(r"disk.img: its file system has no locks \(No locks available\): nothing keeps")
    told: set[int] = set()
    monkeypatch.setattr(locks, "_told", told)

    def call(fd: int, command: int, lock: bytes) -> bytes:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    path = str(image(tmp_path))
    FileEngine(path, call=call).close()
    FileEngine(path, call=call).close()

    assert told == {os.stat(path).st_dev}
