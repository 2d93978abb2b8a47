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
import socket
import time
from collections.abc import Awaitable, Callable
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


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
"""Serves one client until it leaves."""
Listening = list[tuple[asyncio.Server, UnixListener]]


async def listen_twice(path: Path, all_of_it: Serve, reading: Serve) -> Listening:
    """Listen at ``DIR/control/NAME``, and at ``DIR/figures/NAME`` for those who only read.

    Both have mode 0660; what a group can do with that its directory decides. Raises `ConfigError`
    if another daemon answers there, or if a directory is somebody else's.
    """
    figures = path.parent.parent / FIGURES
    os.close(own_directory(path.parent, mode=0o770))
    os.close(own_directory(figures, mode=0o750))
    listening: Listening = []
    try:
        for where, serve in ((path, all_of_it), (figures / path.name, reading)):
            listener = claim(where)
            server = await asyncio.start_unix_server(serve, sock=listener.socket, limit=LINE_MAX)
            listening.append((server, listener))
    except BaseException:
        stop_listening(listening)
        raise
    return listening


def stop_listening(listening: Listening) -> None:
    """Listen no more, and remove the sockets' names."""
    for server, listener in listening:
        server.close()
        listener.remove()


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
        self._reading: Methods = {n: self._methods[n] for n in READING if n in self._methods}
        self._listening: Listening = []

    async def listen(self, path: Path) -> None:
        """Listen at ``DIR/control/NAME`` for everything, and at ``DIR/figures/NAME`` for `READING`.

        See `listen_twice`.
        """
        self._listening = await listen_twice(
            path, partial(self._serve, self._methods), partial(self._serve, self._reading)
        )

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

    async def adopt(self, client: socket.socket, *, reading: bool) -> None:
        """Answer a client that somebody else has accepted; reading: only `READING`."""
        reader, writer = await asyncio.open_connection(sock=client, limit=LINE_MAX)
        await self._serve(self._reading if reading else self._methods, reader, writer)

    async def close(self) -> None:
        """Stop listening, remove the sockets."""
        stop_listening(self._listening)
