# SPDX-License-Identifier: Apache-2.0
"""Calls that may never return, as storage behind a dead server does: each in a thread of its own.

A pool of threads is bounded: a few calls that hang would keep all others waiting, whatever storage
those are for. A thread for each costs some 50 us, for what happens at most a few times in a disk's
life. None of them keeps the process from ending.
"""

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


async def in_own_thread(call: Callable[..., _T], *arguments: object) -> _T:
    """Call it in a new thread and wait for what it returns or raises.

    Cancelling gives the waiting up, not the call: what it returns then is dropped.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[_T] = loop.create_future()

    def tell(result: _T | None, error: BaseException | None) -> None:
        if outcome.done():
            return
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(result)  # type: ignore[arg-type]

    def work() -> None:
        try:
            told: tuple[_T | None, BaseException | None] = (call(*arguments), None)
        except BaseException as error:  # also what ends a thread: the waiting one has to know
            told = (None, error)
        try:
            loop.call_soon_threadsafe(tell, *told)
        except RuntimeError:
            return  # the loop has ended: nobody waits

    thread = threading.Thread(target=work, name="xvd-storage", daemon=True)
    thread.start()
    try:
        return await outcome
    finally:
        if not outcome.cancelled():
            thread.join()  # it has told us, and has nothing more to do
