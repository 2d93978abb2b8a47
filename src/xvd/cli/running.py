# SPDX-License-Identifier: Apache-2.0
"""How a verb runs and ends: its event loop, the signals that end it, and the captive command."""

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Final

from xvd.cli import signals
from xvd.errors import describe
from xvd.files import remove_scratch, scratch_directory

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG: Final = 1
GRACE_S = 4.5
"""What a verb has from a signal to its end, where nothing of a user's is waited for."""


def run(main: Coroutine[Any, Any, int]) -> int:
    """Run a verb's coroutine; its result is the exit status.

    A signal cancels it, unless a `Stop` is made in it, and ends us in `GRACE_S` whatever it does.
    """
    try:
        return asyncio.run(_cancelled_by_signals(main))
    finally:
        signals.heed(signals.leave)


async def _cancelled_by_signals(main: Coroutine[Any, Any, int]) -> int:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    came: list[int] = []
    deadline = signals.Deadline()

    def end(number: int) -> None:
        if came:
            signals.die_by(number)
        came.append(number)
        deadline.arm(GRACE_S)
        loop.call_soon_threadsafe(task.cancel)

    signals.heed(end)
    try:
        return await main
    except asyncio.CancelledError:
        if came:
            raise signals.Signalled(came[0]) from None
        raise
    finally:
        deadline.disarm()


class Stop:
    """SIGTERM, SIGINT and SIGHUP ask for a clean end; a second one ends at once.

    grace_s: what is not over so many seconds after the first one is cut off; None: nothing is.
    `on_hangup` gives SIGHUP another meaning.
    """

    def __init__(self, grace_s: float | None = None) -> None:
        self.asked = asyncio.Event()
        self._came = False
        self._grace_s = grace_s
        self._deadline = signals.Deadline()
        self._loop = asyncio.get_running_loop()
        signals.heed(self._ask, signal.SIGTERM, signal.SIGINT)

    def on_hangup(self, reload: Callable[[], Awaitable[None]]) -> None:
        """Call `reload` in the event loop for a SIGHUP, unless it tells that our terminal is gone.

        The service manager is told before and after. One that is ignored, as by nohup, stays so.
        """
        on_terminal, turn = _has_terminal(), asyncio.Lock()

        async def hang_up() -> None:
            if on_terminal and not _has_terminal():
                self._ask(signal.SIGHUP)
                return
            async with turn:
                usec = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
                tell_service_manager(f"RELOADING=1\nMONOTONIC_USEC={usec}")
                await reload()
                if not self.asked.is_set():
                    tell_service_manager("READY=1")

        def heard(*_: object) -> None:
            asyncio.run_coroutine_threadsafe(hang_up(), self._loop)

        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, heard)

    def end(self) -> None:
        """Ask for a clean end, as the first signal does. For the event loop's thread."""
        self.asked.set()

    def _ask(self, _number: int) -> None:
        if self._came:
            signals.exit_now()
        self._came = True
        self.hurry()
        self._loop.call_soon_threadsafe(self.asked.set)

    def hurry(self) -> None:
        """Start the time to end in, if a limit was given."""
        if self._grace_s is not None:
            self._deadline.arm(self._grace_s)

    def take_time(self) -> None:
        """Stop that time: something is waited for that may take long, as a user's command."""
        self._deadline.disarm()

    async def wait(self) -> None:
        """Wait until the first signal."""
        await self.asked.wait()

    async def wait_or(self, other: Awaitable[object]) -> bool:
        """Wait until the first signal or the end of `other`; return whether it was the signal.

        Raises what `other` has raised.
        """
        waits = asyncio.ensure_future(other), asyncio.ensure_future(self.wait())
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if waits[0] in done:
            waits[0].result()
        return self.asked.is_set()


async def run_captive(command: str, stop: Stop, **environment: str) -> int:
    """Run a shell command with this environment too; its exit status, 128+n if a signal ended it.

    A signal to us is passed on to it, as SIGTERM.
    """
    process = await asyncio.create_subprocess_shell(
        command, env={**os.environ, **environment}, start_new_session=True
    )
    try:
        await stop.wait_or(process.wait())
    finally:
        if process.returncode is None:
            stop.take_time()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
    status = await process.wait()
    stop.hurry()
    return status if status >= 0 else 128 - status


def end_with_parent() -> None:
    """Have SIGTERM come when our parent ends (prctl(2), PR_SET_PDEATHSIG).

    Raises OSError where the system does not have it. A parent that has ended already is noticed.
    """

    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if os.getppid() != parent:
        signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def private_directory() -> Iterator[Path]:
    """A directory for sockets that only this user may enter, gone afterwards; and those are gone
    that killed processes have left."""
    remove_scratch()
    with scratch_directory() as path, signals.removed_at_once(path):
        yield path


def _has_terminal() -> bool:
    """Whether a terminal is ours: one that was hung up is not any more."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


@contextlib.asynccontextmanager
async def watched() -> AsyncIterator[None]:
    """Tell systemd twice in each WatchdogSec= that the event loop runs, if the unit has that.

    A daemon whose loop hangs is killed then, and its successor takes the rings up.
    """
    seconds = _watchdog_s()
    beating = None if seconds is None else asyncio.create_task(_beat(seconds / 2))
    try:
        yield
    finally:
        if beating is not None:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)


def _watchdog_s() -> float | None:
    """Seconds in which systemd wants to hear of this process (sd_watchdog_enabled(3))."""
    usec = os.environ.get("WATCHDOG_USEC", "")
    ours = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return int(usec) / 1e6 if ours and usec.isdigit() and int(usec) else None


async def _beat(seconds: float) -> None:
    while True:
        with contextlib.suppress(OSError):  # a full socket: the next one says it as well
            tell_service_manager("WATCHDOG=1")
        await asyncio.sleep(seconds)


def tell_service_manager(state: str) -> None:
    """Say `state` ("READY=1") to systemd, if it started us with Type=notify (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
            try:
                out.sendto(state.encode(), address.replace("@", "\0", 1))
            except OSError as error:
                logger.warning("NOTIFY_SOCKET=%s does not answer: %s", address, describe(error))
