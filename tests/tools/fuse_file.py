# SPDX-License-Identifier: Apache-2.0
"""An NBD export as a file, by nbdfuse, and a server for it."""

import contextlib
import os
import select
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from nbd_support import require, try_run

READY_S = 30
"""Within which either is ready to be used."""


class FuseFile(NamedTuple):
    path: Path
    server: subprocess.Popen[bytes]


@contextlib.contextmanager
def fuse_file(uri: str, directory: Path) -> Iterator[FuseFile]:
    """The export as a file."""
    directory.mkdir()
    pid = directory.with_suffix(".pid")
    try:
        with running("nbdfuse", "-P", str(pid), str(directory / "nbd"), uri, pid=pid) as process:
            yield FuseFile(directory / "nbd", process)
    finally:
        try_run("fusermount3", "-u", "-z", directory)


@contextlib.contextmanager
def memory_server(socket: Path, size: int) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """An NBD server of a disk in memory, and its URI."""
    require("nbdkit", "nbdfuse", "fusermount3")
    pid = socket.with_suffix(".pid")
    words = ["nbdkit", "-f", "-P", str(pid), "-U", str(socket), "memory", str(size)]
    with running(*words, pid=pid) as process:
        yield process, f"nbd+unix:///?socket={socket}"


@contextlib.contextmanager
def running(*words: str, pid: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server, once it is ready: then it writes its number to the file pid."""
    os.mkfifo(pid)
    ready = os.open(pid, os.O_RDONLY | os.O_NONBLOCK)
    process = subprocess.Popen(words)
    ended = os.pidfd_open(process.pid)
    try:
        readable, _, _ = select.select([ready, ended], [], [], READY_S)
        if readable != [ready]:
            pytest.fail(f"{words}: not ready within {READY_S} s")
        yield process
    finally:
        os.close(ready)
        os.close(ended)
        process.terminate()
        process.wait(30)
