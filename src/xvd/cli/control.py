# SPDX-License-Identifier: Apache-2.0
"""The daemons' control socket: JSON-RPC 2.0, one document a line, on a unix socket.

Each daemon listens under ``DIR/control`` of its host, and once more under ``DIR/figures`` for those
who may read figures and change nothing. asking.py is the other end.
"""

import asyncio
import contextlib
import inspect
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from xvd import __version__
from xvd.errors import XvdError, describe
from xvd.files import own_directory
from xvd.sockets import UnixListener, claim

logger = logging.getLogger(__name__)

FIGURES: Final = "figures"
"""The directory of sockets for readers, beside ``control``."""
READING: Final = ("about", "stats")
"""What may be asked there."""

LINE_MAX: Final = 1 << 20
"""Bytes of a call."""
_PARSE_ERROR, _NO_METHOD, _BAD_PARAMS, _FAILED = -32700, -32601, -32602, -32000


Methods = dict[str, Callable[..., object]]


class Call(msgspec.Struct):
    """A JSON-RPC request."""

    method: str
    params: dict[str, Any] = {}
    id: int | str | None = None
    jsonrpc: str = "2.0"


class ControlServer:
    """Answers calls of `methods`, with params by name; everything in the event loop's thread.

    A method may be a coroutine function. `XvdError` and OSError become the call's error. Beside
    `methods` each daemon tells what it is (``about``) and what it may be asked.
    """

    def __init__(self, methods: Methods) -> None:
        self._methods: Methods = dict(methods)
        self._methods["rpc_get_methods"] = lambda: sorted(self._methods)
        about = {"version": __version__, "pid": os.getpid(), "started_s": time.time()}
        self._methods["about"] = lambda: about
        self._listening: list[tuple[asyncio.Server, UnixListener]] = []

    async def listen(self, path: Path) -> None:
        """Listen at ``DIR/control/NAME`` for everything, and at ``DIR/figures/NAME`` for `READING`.

        Both have mode 0660; what a group can do with that its directory decides. Raises
        `ConfigError` if another daemon answers there, or if a directory is somebody else's.
        """
        os.close(own_directory(path.parent, mode=0o770))
        await self._listen(path, self._methods)
        figures = path.parent.parent / FIGURES
        os.close(own_directory(figures, mode=0o750))
        reading: Methods = {name: self._methods[name] for name in READING if name in self._methods}
        await self._listen(figures / path.name, reading)

    async def _listen(self, path: Path, methods: Methods) -> None:
        listener = claim(path)
        server = await asyncio.start_unix_server(
            partial(self._serve, methods), sock=listener.socket, limit=LINE_MAX
        )
        self._listening.append((server, listener))

    async def _serve(
        self, methods: Methods, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError, ValueError, asyncio.CancelledError):
            while line := await reader.readline():
                writer.write(msgspec.json.encode(await self._answer(methods, line)) + b"\n")
                await writer.drain()
        writer.close()

    async def _answer(self, methods: Methods, line: bytes) -> dict[str, object]:
        try:
            call = msgspec.json.decode(line, type=Call)
        except msgspec.MsgspecError as error:
            problem = {"code": _PARSE_ERROR, "message": str(error)}
            return {"jsonrpc": "2.0", "id": None, "error": problem}
        method = methods.get(call.method)
        if method is None:
            problem = {"code": _NO_METHOD, "message": f"no method {call.method!r}"}
            return {"jsonrpc": "2.0", "id": call.id, "error": problem}
        try:
            result = method(**call.params)
            if inspect.isawaitable(result):
                result = await result
        except (XvdError, OSError, TypeError) as error:
            code = _BAD_PARAMS if isinstance(error, TypeError) else _FAILED
            problem = {"code": code, "message": describe(error)}
            return {"jsonrpc": "2.0", "id": call.id, "error": problem}
        return {"jsonrpc": "2.0", "id": call.id, "result": result}

    async def close(self) -> None:
        """Stop listening, remove the sockets."""
        for server, listener in self._listening:
            server.close()
            listener.remove()
