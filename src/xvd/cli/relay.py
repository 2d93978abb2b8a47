# SPDX-License-Identifier: Apache-2.0
"""The control sockets of guests whose workers cannot have any: the supervisor listens, and passes
calls on.

A worker gets one end of a socket pair for each client. What an administrator names in a call, the
supervisor hears first: so the worker may open that image, and no other.
"""

import asyncio
import contextlib
import json
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Final

from xvd.cli.control import Listening, listen_twice, stop_listening
from xvd.errors import XvdError, describe
from xvd.service.supervisor import PING
from xvd.service.template import Worker

CONTROL: Final = b"c"
"""A client that may call everything; see `Relay` and `follow_clients`."""
READING: Final = b"r"

Over = Callable[[bool | None], None]
"""Is told that a call is over: whether it was done, or None where nobody knows."""
Hear = Callable[[str, str, str], Over]
"""Hears of a call before its worker does: its method, its disk, and the image that it names."""

_HEARD: Final = (b'"image"', b'"pivot"')
"""What is in every call that somebody has to hear of."""

_WAIT_S: Final = 30.0
"""How long a client waits for a worker to be there."""
_ANSWER_MAX: Final = 1 << 24
"""Bytes of a worker's answer: some 2 KiB for each disk."""
_FAILED: Final = -32000


class Relay:
    """The sockets of one guest. For the event loop's thread.

    worker: returns the guest's worker, once it has one. hear: is told of each call that names
    storage, or may move a disk to some that was named before; it may raise `XvdError` or OSError,
    which is the call's answer.
    """

    def __init__(self, worker: Callable[[], Awaitable[Worker]], hear: Hear) -> None:
        self._worker = worker
        self._hear = hear
        self._listening: Listening = []
        self._clients: set[asyncio.Task[None]] = set()

    async def listen(self, path: Path) -> None:
        """Listen; see `listen_twice`."""
        self._listening = await listen_twice(
            path, partial(self._serve, CONTROL), partial(self._serve, READING)
        )

    async def close(self) -> None:
        """Stop listening, and cut every client off."""
        stop_listening(self._listening)
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)

    async def _serve(
        self, kind: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            with contextlib.suppress(OSError, ValueError, TimeoutError, asyncio.CancelledError):
                await self._pass_on(kind, reader, writer)
        finally:
            self._clients.discard(task)
            writer.close()

    async def _pass_on(
        self, kind: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        theirs: tuple[Worker, asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            while line := await reader.readline():
                try:
                    over = self._over(kind, line)
                except (XvdError, OSError) as error:
                    writer.write(_refusal(line, error))
                    await writer.drain()
                    continue
                done = None
                try:
                    async with asyncio.timeout(_WAIT_S):
                        worker = await self._worker()
                    if theirs is None or theirs[0] is not worker:
                        if theirs is not None:
                            theirs[2].close()
                        theirs = worker, *await _client_of(worker, kind)
                    theirs[2].write(line)
                    answer = await theirs[1].readline()
                    if not answer:
                        return  # the worker has ended: what it was asked for may be done, or not
                    done = over and _is_done(answer)
                finally:
                    if over:
                        over(done)
                writer.write(answer)
                await writer.drain()
        finally:
            if theirs is not None:
                theirs[2].close()

    def _over(self, kind: bytes, line: bytes) -> Over | None:
        """Let a call be heard of; None where nobody has to. Raises as `Hear` does."""
        if kind != CONTROL or not any(word in line for word in _HEARD):
            return None
        call = json.loads(line)
        params = call.get("params") if isinstance(call, dict) else None
        if not isinstance(params, dict):
            return None
        words = call.get("method"), params.get("disk", ""), params.get("image", "")
        return self._hear(*map(str, words)) if all(isinstance(it, str) for it in words) else None


def _refusal(line: bytes, error: BaseException) -> bytes:
    problem = {"code": _FAILED, "message": describe(error)}
    answer = {"jsonrpc": "2.0", "id": json.loads(line).get("id"), "error": problem}
    return json.dumps(answer).encode() + b"\n"


def _is_done(answer: bytes) -> bool | None:
    """Whether a worker says that it has done what it was asked for."""
    with contextlib.suppress(ValueError):
        told = json.loads(answer)
        if isinstance(told, dict):
            return "error" not in told
    return None


async def _client_of(
    worker: Worker, kind: bytes
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a way to a worker's answers."""
    ours, its = socket.socketpair()
    with its:
        try:
            socket.send_fds(worker.channel, [kind], [its.fileno()])
        except OSError:
            ours.close()
            raise
    return await asyncio.open_connection(sock=ours, limit=_ANSWER_MAX)


def follow_clients(
    channel: socket.socket,
    adopt: Callable[[socket.socket, bool], Awaitable[None]],
    asked: Callable[[], None],
) -> Callable[[], None]:
    """Serve the clients that come by a worker's channel, and answer that it is alive, each time
    that it is asked, and tell that it was; what is returned ends that."""
    loop = asyncio.get_running_loop()
    channel.setblocking(False)
    serving: set[asyncio.Future[None]] = set()

    def come() -> None:
        kind, fds, _, _ = socket.recv_fds(channel, 1, 1)
        if not kind:
            loop.remove_reader(channel)
        if kind == PING:
            with contextlib.suppress(BlockingIOError):
                channel.send(PING)
            asked()
        for fd in fds:
            task = asyncio.ensure_future(adopt(socket.socket(fileno=fd), kind == READING))
            serving.add(task)
            task.add_done_callback(serving.discard)

    def end() -> None:
        loop.remove_reader(channel)
        for task in serving:
            task.cancel()

    loop.add_reader(channel, come)
    return end
