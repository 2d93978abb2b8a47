# SPDX-License-Identifier: Apache-2.0
"""Processes that stand still: alive, and doing nothing."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path


def stand_still(pid: int) -> None:
    """Stop a process. A thread that runs on another CPU goes on until the kernel gets round to it:
    so this returns once all have stopped."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + 10
    while not all(map(has_stopped, Path(f"/proc/{pid}/task").iterdir())):
        assert time.monotonic() < deadline, f"process {pid} goes on"
        os.sched_yield()


def has_stopped(thread: Path) -> bool:
    """Whether a thread of /proc stands still, or has ended."""
    try:
        state = (thread / "stat").read_text().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "TtZX"


def go_on(pid: int) -> None:
    """Let a process that stands still go on."""
    os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def standing_still(pid: int) -> Iterator[None]:
    """Let a process stand still meanwhile."""
    stand_still(pid)
    try:
        yield
    finally:
        go_on(pid)
