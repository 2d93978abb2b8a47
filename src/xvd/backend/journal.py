# SPDX-License-Identifier: Apache-2.0
"""Where a queue's journal lives: a small file in memory-backed storage, one for each connection.

Its name says which ring it belongs to, so that a journal of another connection is never taken up.
dataplane/queue.pyx says what is in it and why.
"""

import mmap
import os
from pathlib import Path

from xvd.dataplane.queue import journal_size


class Journal:
    """A journal's memory; without a directory it dies with the process.

    disk, ring: names, the second of what tells this ring from the disk's others. What a
    predecessor left is taken up; `found` tells whether it left anything.
    """

    def __init__(self, directory: Path | None, disk: str, ring: str, nr_ents: int) -> None:
        size = journal_size(nr_ents)
        self._path = None if directory is None else directory / f"{disk}.{ring}.ring"
        self.memory: bytearray | mmap.mmap
        self.found = False
        if self._path is None:
            self.memory = bytearray(size)
            return
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.found = self._path.exists()
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, size)
            self.memory = mmap.mmap(fd, size)
        finally:
            os.close(fd)

    @staticmethod
    def forget(directory: Path | None, disk: str) -> None:
        """Remove what earlier connections of the disk left, whatever number of queues they had."""
        if directory is not None:
            for pattern in (f"{disk}.*.ring", f"{disk}-[0-9]*.*.ring"):
                for old in directory.glob(pattern):
                    old.unlink(missing_ok=True)

    def end(self) -> None:
        """The connection is closed: nobody will take it up."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
