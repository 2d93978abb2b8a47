# SPDX-License-Identifier: Apache-2.0
"""A daemon goes on as another process, once another version of its program is installed.

The successor begins while its predecessor serves, and waits when it has loaded all that it needs.
Then the predecessor lets its disks go: guests wait for as long as these are nobody's, and not
for Python. What the service manager is told makes the successor the service's main process.
"""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

import xvd
from xvd.cli import output, signals
from xvd.cli.running import Stop, tell_service_manager
from xvd.errors import PeerClosed, describe

_STREAM: Final = "XVD_PREDECESSOR"
"""Of a successor's environment: its descriptor of a stream to its predecessor, which ends when the
disks are nobody's."""
_READY: Final = b"r"
READY_S: Final = 30.0
"""How long a successor may take to load its program, and to reach its host."""
LET_GO_S: Final = 5.0
"""Then its predecessor ends, whatever storage hangs."""


def _installed() -> tuple[int, ...]:
    """Return what tells the files of a program from those of another version at the same paths."""
    found = map(os.stat, (xvd.__file__, sys.argv[0]))
    return tuple(number for one in found for number in (one.st_dev, one.st_ino, one.st_mtime_ns))


def _begin() -> "tuple[subprocess.Popen[bytes], socket.socket]":
    """Start this program as it was started, and a stream to it. Raises `PeerClosed`."""
    ours, its = socket.socketpair()
    ours.setblocking(False)
    environment = os.environ | {_STREAM: str(its.fileno())}
    environment.pop("WATCHDOG_PID", None)  # which is ours
    words = [sys.executable, *sys.orig_argv[1:]]
    try:
        with its:
            return subprocess.Popen(words, env=environment, pass_fds=[its.fileno()]), ours
    except OSError as error:
        ours.close()
        raise PeerClosed(f"the program cannot be started: {describe(error)}") from None


def predecessor() -> socket.socket | None:
    """Take the stream to the daemon that this one is to follow; None: it is the first one."""
    text = os.environ.pop(_STREAM, "")
    return socket.socket(fileno=int(text)) if text else None


class Succession:
    """Those before and after this daemon. For the event loop's thread.

    stop: is asked to end this one when another goes on. before: see `predecessor`.
    """

    def __init__(self, stop: Stop, before: socket.socket | None) -> None:
        self._stop = stop
        self._predecessor = before
        self._successor: socket.socket | None = None
        self._runs = self._found()

    @staticmethod
    def _found() -> tuple[int, ...] | None:
        with contextlib.suppress(OSError):  # just now there is none: it is being replaced
            return _installed()
        return None

    @property
    def is_due(self) -> bool:
        """Whether another version is installed than the one that runs, and none goes on yet."""
        found = self._found()
        return self._successor is None and found is not None and found != self._runs

    @property
    def has_successor(self) -> bool:
        """Whether another process goes on."""
        return self._successor is not None

    async def follow(self) -> bool:
        """Wait until the predecessor, if there was one, has let its disks go; whether to go on."""
        if self._predecessor is None:
            return True
        loop = asyncio.get_running_loop()
        with self._predecessor as stream, contextlib.suppress(OSError):  # it is gone, however
            stream.setblocking(False)
            await loop.sock_sendall(stream, _READY)
            return not await self._stop.wait_or(loop.sock_recv(stream, 1))
        return True

    async def hand_over(self) -> None:
        """Begin a successor, and ask this daemon to end when that is ready.

        Raises `PeerClosed` where it does not get so far; then all is as it was.
        """
        process, stream = _begin()
        try:
            async with asyncio.timeout(READY_S):
                if not await asyncio.get_running_loop().sock_recv(stream, 1):
                    raise PeerClosed("it ended; the lines before this one say why")
        except BaseException as error:
            stream.close()
            process.kill()
            process.wait()
            if not isinstance(error, (OSError, PeerClosed)):
                raise
            late = isinstance(error, TimeoutError)
            why = f"not within {READY_S:g} s" if late else describe(error)
            raise PeerClosed(f"the program that is installed now does not begin: {why}") from None
        tell_service_manager(f"MAINPID={process.pid}")
        self._successor = stream
        signals.Deadline().arm(LET_GO_S)
        self._stop.end()

    def tell_ready(self, kinds: Sequence[str]) -> None:
        """Tell whoever started this daemon, and the service manager, that it serves such disks."""
        if self._predecessor is None:  # otherwise they have heard it, and may have left since
            output.tell("ready\n")
        tell_service_manager(f"READY=1\nSTATUS=serving {', '.join(kinds)}")

    def tell_end(self) -> None:
        """Tell the service manager that the service ends, unless another process goes on."""
        if self._successor is None:
            tell_service_manager("STOPPING=1")

    def let_go(self) -> None:
        """Let a successor begin: nothing is served here any more."""
        if self._successor is not None:
            self._successor.close()
