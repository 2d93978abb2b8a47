# SPDX-License-Identifier: Apache-2.0
"""A call of a daemon on its control socket; control.py is the other end.

By the standard library's JSON: importing msgspec takes longer than most daemons take to answer.
"""

import asyncio
import json
from pathlib import Path
from typing import Any, Final

from xvd.errors import ConfigError, PeerClosed, XvdError, describe

ANSWER_MAX: Final = 1 << 28
"""Bytes of an answer: some 2 KiB for each disk."""


class DaemonError(XvdError):
    """What a daemon said instead of doing what it was asked for."""


async def ask(path: Path, method: str, **params: object) -> Any:
    """Call a daemon; `PeerClosed` if none answers there, `DaemonError` if it says no.

    Raises `ConfigError` where we may not ask.
    """
    call = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    try:
        reader, writer = await asyncio.open_unix_connection(path, limit=ANSWER_MAX)
        writer.write(json.dumps(call).encode() + b"\n")
        line = await reader.readline()
        writer.close()
        answer = json.loads(line) if line else None
    except PermissionError as error:
        raise ConfigError(f"{path}: {error.strerror}; be the user who runs the daemon") from None
    except (OSError, ValueError) as error:
        raise PeerClosed(f"{path}: no daemon answers: {describe(error)}") from None
    if answer is None:
        raise PeerClosed(f"{path}: the daemon closed the connection")
    if "error" in answer:
        raise DaemonError(answer["error"]["message"])
    return answer["result"]
