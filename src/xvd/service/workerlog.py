# SPDX-License-Identifier: Apache-2.0
"""What the process of a guest says, on its way to the daemon's log: by a pipe to the supervisor.

A worker that is its guest's could write to a log of its own without end, and in the name of other
guests. So its descriptors 1 and 2 are a pipe, and it has no other way to any log. The supervisor
reads as much of that as a guest may cause, whichever of its workers it comes from, counts the rest,
and puts the guest's number to each line.

A line of ours is one of JSON behind `_MARK`; anything else is what a library, or a worker that
fails, has printed.
"""

import asyncio
import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from xvd.loglimit import fields

BURST: Final = 500
RATE: Final = 10.0
"""Lines that a guest may cause at once, and a second."""
DEBUG_FACTOR: Final = 100
"""How much more it may be where everything is logged, for a search of mistakes."""
TEXT_MAX: Final = 8 << 10
"""Characters of a text."""
TELL_S: Final = 10.0
"""From the first line that was left out to the line that says how many there were."""

_READ: Final = 64 << 10
_PAUSE_S: Final = 0.25
"""From one read to the next of a worker that has used up what it may cause."""
_LINE_MAX: Final = 4 * _READ
_MARK: Final = b"\x1e"
_MODULE: Final = re.compile(r"xvd(\.[a-z_]{1,30}){0,6}")
_EVENT: Final = re.compile(r"[a-z-]{0,40}")
_VDEV: Final = re.compile(r"[a-z0-9]{0,20}")
_PRINTED: Final = "xvd.worker"
"""The logger of what no logger said."""

Line = tuple[int, str, str, str, str, str]
"""Level, logger, text, domain, device, event."""


# ---- In the worker -------------------------------------------------------------------------------


class PipeHandler(logging.Handler):
    """Writes each line to descriptor 2 as the supervisor takes it; any thread. It never waits: what
    there is no room for is lost, and counted by nobody."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line with its fields."""
        about = (getattr(record, name, "") for name in fields(""))
        text = self.format(record)[:TEXT_MAX]
        line = json.dumps([record.levelno, record.name, text, *map(str, about)])
        with contextlib.suppress(OSError):
            os.write(2, _MARK + line.encode() + b"\n")


def log_to(pipe: int) -> None:
    """Let a pipe be all that this process can say anything by; it is closed. In the only thread."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    nowhere = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    for fd, number in ((nowhere, 0), (pipe, 1), (pipe, 2)):
        os.dup2(fd, number)
    os.close(nowhere)
    os.close(pipe)
    root.addHandler(PipeHandler())


# ---- In the supervisor ---------------------------------------------------------------------------


class Allowance:
    """How many lines one guest may cause. For the event loop's thread.

    clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left = float(BURST * self._factor)
        self._since = clock()

    @property
    def _factor(self) -> int:
        return DEBUG_FACTOR if logging.getLogger().isEnabledFor(logging.DEBUG) else 1

    @property
    def is_used_up(self) -> bool:
        """Whether the last line was one too many."""
        return self._left < 1

    def take(self) -> bool:
        """Whether there may be one more line."""
        now, factor = self._clock(), self._factor
        more = (now - self._since) * RATE * factor
        self._left, self._since = min(float(BURST * factor), self._left + more), now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class WorkerLog:
    """Our end of a worker's pipe, until `close`. For the event loop's thread.

    domains: the guest's. allowance: the guest's. its: the worker's end, the caller's to close.
    Raises OSError.
    """

    def __init__(self, domains: Sequence[int], allowance: Allowance) -> None:
        self._domains = [str(domain) for domain in domains]
        self._allowance = allowance
        self._left_out = 0
        self._part = b""
        self._loop = asyncio.get_running_loop()
        self._telling: asyncio.TimerHandle | None = None
        self._pausing: asyncio.TimerHandle | None = None
        self._fd, self.its = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._go_on()

    def close(self) -> None:
        """Log what there still is, and let go of the pipe."""
        self._loop.remove_reader(self._fd)
        if self._pausing is not None:
            self._pausing.cancel()
        self._read()
        os.close(self._fd)
        self._take([self._part] if self._part else [])
        if self._telling is not None:
            self._telling.cancel()
            self._tell()

    def _go_on(self) -> None:
        self._pausing = None
        self._loop.add_reader(self._fd, self._come)

    def _come(self) -> None:
        """Read a part. One who says too much waits: its pipe is full, and costs nobody anything."""
        ended = not self._read()
        if ended or self._allowance.is_used_up:
            self._loop.remove_reader(self._fd)
        if self._allowance.is_used_up and not ended:
            self._pausing = self._loop.call_later(_PAUSE_S, self._go_on)

    def _read(self) -> bool:
        """Read and log a part; whether there may be more one day."""
        try:
            data = os.read(self._fd, _READ)
        except BlockingIOError:
            return True
        *lines, self._part = (self._part + data).split(b"\n")
        if len(self._part) > _LINE_MAX:
            lines.append(self._part)
            self._part = b""
        self._take(lines)
        return bool(data)

    def _take(self, lines: Sequence[bytes]) -> None:
        """Log lines for as long as there may be more; what is left out is not looked at."""
        for number, line in enumerate(lines):
            if not self._allowance.take():
                self._leave_out(len(lines) - number)
                return
            # A line that found no room for its end is followed by the next one at once.
            printed, *said = line.split(_MARK)
            if printed or not said:
                self._log(_printed(printed))
            for each in said:
                self._log(_said(each))

    def _log(self, line: Line) -> None:
        level, name, text, domain, vdev, event = line
        root = logging.getLogger()
        if not root.isEnabledFor(level):
            return
        if domain not in self._domains:
            domain, vdev = self._domains[0], ""
        if not text.startswith(f"{domain}/"):
            text = f"domain {domain}: {text}"
        about = fields(domain, vdev, event)
        root.handle(root.makeRecord(name, level, "", 0, "%s", (text,), None, extra=about))

    def _leave_out(self, count: int) -> None:
        self._left_out += count
        if self._telling is None:
            self._telling = self._loop.call_later(TELL_S, self._tell)

    def _tell(self) -> None:
        count, self._left_out, self._telling = self._left_out, 0, None
        domain = self._domains[0]
        logging.getLogger(__name__).warning(
            "domain %s: %d more lines of its process left out", domain, count,
            extra=fields(domain, event="lines-left-out"),
        )  # fmt: skip


def _said(line: bytes) -> Line:
    """Take a line of ours apart, and believe nothing of it."""
    try:
        level, name, text, domain, vdev, event = msgspec.json.decode(line, type=Line)
    except msgspec.MsgspecError:
        return _printed(line)
    return (
        min(max(level, logging.DEBUG), logging.CRITICAL),
        name if _MODULE.fullmatch(name) else _PRINTED,
        _shown(text),
        domain,
        vdev if _VDEV.fullmatch(vdev) else "",
        event if _EVENT.fullmatch(event) else "",
    )


def _printed(line: bytes) -> Line:
    """Return what something else has printed, as a line of ours."""
    return logging.ERROR, _PRINTED, _shown(line.decode("utf-8", "replace")), "", "", ""


def _shown(text: str) -> str:
    """Return a text that cannot be taken for several lines, and does nothing to a terminal."""
    lines = text[:TEXT_MAX].splitlines() or [""]
    plain = ("".join(c if c.isprintable() else "?" for c in line) for line in lines)
    return "\n    ".join(plain)
