# SPDX-License-Identifier: Apache-2.0
"""What the store says of a host's guests."""

import asyncio
from collections.abc import Collection
from pathlib import Path
from typing import Final

from xvd.machine.emulated.paths import XENSTORE_SOCKET
from xvd.machine.xen import xenstore
from xvd.machine.xs.client import XenstoreClient

NAMES_S: Final = 1.0
"""In which the store says what guests are called."""


async def guest_names(host: Path, domids: Collection[str]) -> dict[str, str]:
    """Return what guests are called, by their numbers, as far as the store says so.

    Raises `XvdError`, OSError or TimeoutError where there is no store that answers us.
    """
    if not domids:
        return {}
    emulated = host / XENSTORE_SOCKET
    connecting = XenstoreClient.connect(emulated) if emulated.exists() else xenstore.connect()
    async with asyncio.timeout(NAMES_S):
        async with await connecting as store:
            found = await store.try_read_each([f"/local/domain/{domid}/name" for domid in domids])
    return {domid: name for domid, name in zip(domids, found, strict=True) if isinstance(name, str)}
