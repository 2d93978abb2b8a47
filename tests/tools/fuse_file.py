# SPDX-License-Identifier: Apache-2.0
"""An NBD export as a file, by nbdfuse."""

import contextlib
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from nbd_support import try_run


@contextlib.contextmanager
def fuse_file(uri: str, directory: Path) -> Iterator[Path]:
    """The export as a file."""
    directory.mkdir()
    pid = directory.with_suffix(".pid")
    os.mkfifo(pid)  # nbdfuse writes its number when the file is there: opening waits for that
    process = subprocess.Popen(["nbdfuse", "-P", str(pid), str(directory / "nbd"), uri])
    watchdog = threading.Timer(30, process.kill)
    watchdog.start()
    try:
        pid.read_text()
        yield directory / "nbd"
    finally:
        try_run("fusermount3", "-u", directory)
        process.wait(30)
        watchdog.cancel()
