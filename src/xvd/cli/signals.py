# SPDX-License-Identifier: Apache-2.0
"""How a verb ends by a signal: cleanly where it can, and always.

SIGTERM, SIGINT and SIGHUP mean the same. Whoever is at work decides what a signal does (`heed`):
code without an event loop is left by `Signalled`, a coroutine is cancelled, a daemon asked to end.
What takes too long after that is cut off by a thread (`Deadline`), which needs neither the event
loop nor the main thread: a call into a host that has stopped blocks both.
"""

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NoReturn

ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_leftovers: set[Path] = set()


class Signalled(BaseException):
    """A signal has ended the verb; everything that it took is being given back."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _heeded() -> list[signal.Signals]:
    """Return the signals that are not ignored: nohup, or a shell without job control, means it."""
    return [one for one in ENDING if signal.getsignal(one) is not signal.SIG_IGN]


def heed(then: Callable[[int], None], *always: signal.Signals) -> None:
    """Call `then` in the main thread with the signal's number; `always`: even if ignored so far."""
    for one in {*_heeded(), *always}:
        signal.signal(one, lambda number, _: then(number))


def leave(number: int) -> None:
    """Leave the code that runs by `Signalled`; another signal then ends the process at once."""
    heed(die_by)
    raise Signalled(number)


def die_by(number: int) -> NoReturn:
    """End by this signal, so that whoever started us sees it."""
    _remove_leftovers()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # only where it is blocked


def exit_now(status: int = 1) -> NoReturn:
    """End at once: no code runs any more, and no directory of ours is left."""
    _remove_leftovers()
    os._exit(status)


@contextlib.contextmanager
def removed_at_once(path: Path) -> Iterator[None]:
    """A directory that goes even if the process is ended at once."""
    _leftovers.add(path)
    try:
        yield
    finally:
        _leftovers.discard(path)


def _remove_leftovers() -> None:
    for path in list(_leftovers):
        shutil.rmtree(path, ignore_errors=True)


class Deadline:
    """Ends the process when it has not ended by itself in time."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None

    def arm(self, seconds: float) -> None:
        """Count from now on."""
        self.disarm()
        self._timer = threading.Timer(seconds, exit_now)
        self._timer.daemon = True
        self._timer.start()

    def disarm(self) -> None:
        """Stop the time: something is waited for that may take long."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
