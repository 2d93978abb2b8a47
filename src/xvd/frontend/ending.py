# SPDX-License-Identifier: Apache-2.0
"""How a frontend's disk ends: how long one waits, and what its user is told."""

import asyncio
from collections.abc import Callable
from typing import Final

from xvd.blkif.handshake import TRIES_MAX, FrontendEvent

RESET_STEP_S = 5.0
"""Longest wait in each step of a reset, as Linux has it (xenbus_probe_frontend.c)."""

RETURN_S = 30.0
"""How long a backend that has closed may take to offer the disk again before its user is told."""

_ABANDONED_S: Final = 1.0
"""For `run` to notice that it is to return."""

REASONS: Final = {
    FrontendEvent.BACKEND_UNKNOWN: "there is no backend; the disk was removed",
    FrontendEvent.REMOVED: "the disk was removed",
    FrontendEvent.REFUSED: f"the backend has refused {TRIES_MAX} connections in a row; its log "
    "and its error node say why",
    FrontendEvent.NOT_BACK: f"the backend has closed and not come back within {RETURN_S:g} s; "
    "start one, and open the disk again",
    FrontendEvent.UNANSWERED: "the backend has answered nothing for {0.answer_timeout:g} s; "
    "start one, and open the disk again",
}
"""Why a disk ends that nobody closed, by the event that ends it."""


async def wait_for_end(
    running: asyncio.Task[None], abandon: Callable[[], None], timeout_s: float | None
) -> None:
    """Wait for a device's `run`, which was asked to end; after `timeout_s`, if any, abandon it."""
    try:
        if (await asyncio.wait([running], timeout=timeout_s))[1]:
            abandon()
            if (await asyncio.wait([running], timeout=_ABANDONED_S))[1]:
                running.cancel()  # it waits for a store that does not answer
    except asyncio.CancelledError:
        running.cancel()
        raise
    finally:
        await asyncio.gather(running, return_exceptions=True)
