# SPDX-License-Identifier: Apache-2.0
"""An NBD export as a file, by nbdfuse, and a server whose file system can stand still."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from nbd_support import require, try_run


class FuseFile(NamedTuple):
    path: Path
    server: subprocess.Popen[bytes]


@contextlib.contextmanager
def fuse_file(uri: str, directory: Path) -> Iterator[FuseFile]:
    """The export as a file."""
    directory.mkdir()
    pid = directory.with_suffix(".pid")
    os.mkfifo(pid)  # nbdfuse writes its number when the file is there: opening waits for that
    process = subprocess.Popen(["nbdfuse", "-P", str(pid), str(directory / "nbd"), uri])
    watchdog = threading.Timer(30, process.kill)
    watchdog.start()
    try:
        pid.read_text()
        watchdog.cancel()
        yield FuseFile(directory / "nbd", process)
    finally:
        try_run("fusermount3", "-u", "-z", directory)
        watchdog.cancel()
        process.wait(30)


@contextlib.contextmanager
def memory_server(socket: Path, size: int) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """An NBD server of a disk in memory, and its URI."""
    require("nbdkit", "nbdfuse", "fusermount3")
    process = subprocess.Popen(["nbdkit", "-f", "-U", str(socket), "memory", str(size)])
    try:
        yield process, f"nbd+unix:///?socket={socket}"
    finally:
        process.terminate()
        process.wait(30)


@contextlib.contextmanager
def stopped(send: Callable[[int], None]) -> Iterator[None]:
    """Let a process stand still meanwhile; send: sends it a signal."""
    send(signal.SIGSTOP)
    try:
        yield
    finally:
        send(signal.SIGCONT)
