# SPDX-License-Identifier: Apache-2.0
"""The daemons' control socket: JSON-RPC 2.0, one document a line, on a unix socket.

Each daemon listens under ``DIR/control`` of its host. asking.py is the other end.
"""

import asyncio
import contextlib
import inspect
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from xvd import __version__
from xvd.errors import XvdError, describe
from xvd.files import own_directory
from xvd.sockets import UnixListener, claim

logger = logging.getLogger(__name__)

LINE_MAX: Final = 1 << 20
"""Bytes of a call."""
_PARSE_ERROR, _NO_METHOD, _BAD_PARAMS, _FAILED = -32700, -32601, -32602, -32000


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

    def __init__(self, methods: dict[str, Callable[..., object]]) -> None:
        self._methods: dict[str, Callable[..., object]] = dict(methods)
        self._methods["rpc_get_methods"] = lambda: sorted(self._methods)
        about = {"version": __version__, "pid": os.getpid(), "started_s": time.time()}
        self._methods["about"] = lambda: about
        self._server: asyncio.Server | None = None
        self._listener: UnixListener | None = None

    async def listen(self, path: Path) -> None:
        """Listen at `path`, mode 0660; `ConfigError` if another daemon answers there, or if its
        directory is somebody else's."""
        os.close(own_directory(path.parent, mode=0o770))
        self._listener = claim(path)
        sock = self._listener.socket
        self._server = await asyncio.start_unix_server(self._serve, sock=sock, limit=LINE_MAX)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError, asyncio.CancelledError):
            while line := await reader.readline():
                writer.write(msgspec.json.encode(await self._answer(line)) + b"\n")
                await writer.drain()
        writer.close()

    async def _answer(self, line: bytes) -> dict[str, object]:
        try:
            call = msgspec.json.decode(line, type=Call)
        except msgspec.MsgspecError as error:
            problem = {"code": _PARSE_ERROR, "message": str(error)}
            return {"jsonrpc": "2.0", "id": None, "error": problem}
        method = self._methods.get(call.method)
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
        """Stop listening, remove the socket."""
        if self._server is not None:
            self._server.close()
        if self._listener is not None:
            self._listener.remove()
