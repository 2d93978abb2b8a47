# SPDX-License-Identifier: Apache-2.0
"""Keeps a storage daemon running: one that dies has a successor, and no operation fails for it.

What the dead one had not answered is asked again. What it had answered for and may not have written
out is written again before, in the order of the answers.
"""

import asyncio
import contextlib
import dataclasses
import errno
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from xvd.engines.qemu.daemon import QUEUES, Daemon
from xvd.engines.qemu.nodes import Nodes
from xvd.engines.qemu.vhost_user import BlkConfig
from xvd.engines.vhost import AREA_BYTES, LAYOUT, RING_ENTRIES, VhostChannel, Writes
from xvd.errors import EngineError, describe
from xvd.types import EngineOp

logger = logging.getLogger(__name__)

T = TypeVar("T")

_ADDRESS: Final = 1 << 32
"""What the daemon calls the first byte of the memory that it is given."""
_REPLAY: Final = 0
"""The virtqueue by which what was not flushed is written again; channels have the others."""
_FIRST_S: Final = 0.1
_MOST_S: Final = 10.0
"""From one try to start a successor to the next."""
_LOCKED_S: Final = 0.05
_BACK_S: Final = 30.0
"""For a successor of a daemon that was asked to end."""


class _Memory:
    """What all virtqueues lie in: a file that a daemon maps once. Untouched parts cost nothing."""

    def __init__(self) -> None:
        self.size = AREA_BYTES * QUEUES
        self.fd = os.memfd_create("xvd-vhost", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.size)
        self._map = mmap.mmap(self.fd, self.size)

    def channel(self, index: int, writes: Writes, config: BlkConfig) -> VhostChannel:
        """Make a channel in the area of a virtqueue."""
        at = AREA_BYTES * index
        return VhostChannel(
            self._map,
            at,
            _ADDRESS + at,
            writes,
            discard_bytes=config.discard_max,
            zeroes_bytes=config.zeroes_max,
        )

    def close(self) -> None:
        """Give it back once no channel is left. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class Keeper:
    """The daemon of one disk. Any thread; raises `EngineError` where it cannot be started.

    patience_s: how long to wait for a predecessor's lock on the image.
    """

    def __init__(self, nodes: Nodes, patience_s: float) -> None:
        self.trouble = ""
        """Why there is no daemon now, in words; empty while there is one."""
        self._nodes = nodes
        self._writes = Writes()
        self._memory = _Memory()
        self._channels: list[VhostChannel] = []
        self._idle: list[VhostChannel] = []
        self._daemon: Daemon | None = None
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._back = asyncio.Event()
        self._asked: tuple[Callable[[], None], asyncio.Future[None]] | None = None
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(patience_s, started), name="xvd-qsd", daemon=True
        )
        self._thread.start()
        try:
            started.result()
        except BaseException:
            self._end()
            raise

    def open_channel(self) -> VhostChannel:
        """Return a channel that nobody else has, until `give_back`."""
        return self._call(self._open_channel())

    def give_back(self, channel: VhostChannel) -> None:
        """Take a channel back that nobody uses any more: nothing is in flight on it."""
        self._loop.call_soon_threadsafe(self._idle.append, channel)

    def execute(self, command: str, **arguments: object) -> Any:
        """Give the daemon a QMP command. Raises `EngineError`, ENOTCONN while there is none."""
        return self._call(self._execute(command, arguments))

    def without_daemon(self, work: Callable[[], None]) -> None:
        """Let the daemon write out what it has and end, do something with its image, and start
        another daemon. Nothing may be in flight, and all be flushed. Raises what `work` raises."""
        self._call(self._ask_without_daemon(work))

    @property
    def pid_fd(self) -> int:
        """A pidfd of the daemon, or -1 while there is none. For tests."""
        return -1 if self._daemon is None else self._daemon.pidfd

    def close(self) -> None:
        """Let the daemon write out what it has, and end. Idempotent."""
        with contextlib.suppress(RuntimeError):  # the loop has ended before
            self._loop.call_soon_threadsafe(self._closing.set)
        self._end()

    def _end(self) -> None:
        self._thread.join()
        self._channels.clear()
        self._idle.clear()
        self._memory.close()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # ---- The thread ----

    def _run(self, patience_s: float, started: Future[None]) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._keep(patience_s, started))

    async def _keep(self, patience_s: float, started: Future[None]) -> None:
        try:
            self._daemon, self.config = await self._start_first(patience_s)
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        while self._daemon is not None and await self._lives(self._daemon):
            asked, self._asked = self._asked, None
            if asked is None:
                logger.warning("the storage daemon of %s died", self._name)
            for channel in self._channels:
                channel.halt()
            await self._daemon.stop()
            self._daemon = None
            if asked is not None:
                await self._do_without_daemon(*asked)
            level = logging.WARNING if asked is None else logging.INFO
            await self._succeed(level)
            self._back.set()
        if self._daemon is not None:
            await self._daemon.stop()

    @property
    def _name(self) -> str:
        return self._nodes.path or str(self._nodes.blockdev["driver"])

    async def _ask_without_daemon(self, work: Callable[[], None]) -> None:
        if self._daemon is None or self._asked is not None:
            raise EngineError(errno.ENOTCONN, self.trouble or "it is busy", self._name)
        done = asyncio.get_running_loop().create_future()
        self._asked = (work, done)
        self._back.clear()
        self._daemon.end_soon()
        await done
        try:
            async with asyncio.timeout(_BACK_S):
                await self._back.wait()
        except TimeoutError:
            raise EngineError(errno.ENOTCONN, self.trouble, self._name) from None

    async def _do_without_daemon(
        self, work: Callable[[], None], done: "asyncio.Future[None]"
    ) -> None:
        """Do it, and let the image have another size afterwards."""
        try:
            await asyncio.to_thread(work)
        except Exception as error:  # it is whoever asked who is told
            done.set_exception(error)
        else:
            self.config = dataclasses.replace(self.config, size=0)
            done.set_result(None)

    async def _lives(self, daemon: Daemon) -> bool:
        """Whether it has died, once it has; False when this is to end."""
        waits = [asyncio.create_task(it) for it in (daemon.dead(), self._closing.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        return not self._closing.is_set()

    async def _start_first(self, patience_s: float) -> tuple[Daemon, BlkConfig]:
        deadline = time.monotonic() + patience_s
        while True:
            try:
                return await self._start()
            except EngineError as error:
                if error.errno != errno.EBUSY or time.monotonic() >= deadline:
                    raise
            await asyncio.sleep(_LOCKED_S)

    async def _start(self) -> tuple[Daemon, BlkConfig]:
        daemon, config = await Daemon.start(self._nodes)
        try:
            daemon.session.share(self._memory.fd, self._memory.size, _ADDRESS)
        except BaseException:
            await daemon.stop()
            raise
        return daemon, config

    async def _succeed(self, level: int) -> None:
        """Start a successor, however long that takes, and let it go on. level: of saying so."""
        pause = _FIRST_S
        while not self._closing.is_set():
            try:
                await self._try_to_succeed()
            except Exception as error:  # a mistake of ours too costs no more than the time
                if not self.trouble:
                    told = isinstance(error, OSError)
                    text = describe(error)
                    logger.error(
                        "%s: no other storage daemon: %s", self._name, text, exc_info=not told
                    )
                self.trouble = f"its storage daemon died, and there is no other: {describe(error)}"
            else:
                logger.log(level, "%s goes on with another storage daemon", self._name)
                self.trouble = ""
                return
            try:
                async with asyncio.timeout(pause):
                    await self._closing.wait()
            except TimeoutError:
                pause = min(2 * pause, _MOST_S)

    async def _try_to_succeed(self) -> None:
        daemon, config = await self._start()
        try:
            if config.size < self.config.size:
                raise EngineError(errno.EIO, f"it has {config.size} bytes now", self._name)
            await asyncio.to_thread(self._write_again, daemon)
            self._daemon = daemon
            for index, channel in enumerate(self._channels, _REPLAY + 1):
                self._start_queue(index, channel)
        except BaseException:
            self._daemon = None
            await daemon.stop()
            for channel in self._channels:  # only now: until it is dead it may answer
                channel.halt()
            raise

    def _write_again(self, daemon: Daemon) -> None:
        """Write what was answered for and not flushed, and flush it."""
        records = sorted(record for channel in self._channels for record in channel.unflushed())
        if not records:
            return
        replay = self._memory.channel(_REPLAY, Writes(), self.config)
        fds = (replay.kick_fd, replay.call_fd)
        daemon.session.start_queue(_REPLAY, RING_ENTRIES, _ADDRESS, LAYOUT, fds)
        replay.go()
        work = [(op, offset, data or length) for _, op, offset, length, data in records]
        for op, offset, data in (*work, (EngineOp.FLUSH, 0, 0)):
            if number := replay.perform(op, offset, data, daemon.pidfd):
                raise EngineError(number, "what was not flushed cannot be written again")
        for channel in self._channels:
            channel.forget_unflushed()
        logger.warning("%s: %d writes were not flushed, and are again", self._name, len(records))

    def _start_queue(self, index: int, channel: VhostChannel) -> None:
        assert self._daemon is not None
        address = _ADDRESS + AREA_BYTES * index
        fds = (channel.kick_fd, channel.call_fd)
        self._daemon.session.start_queue(index, RING_ENTRIES, address, LAYOUT, fds)
        channel.go()

    async def _open_channel(self) -> VhostChannel:
        if self._idle:
            return self._idle.pop()
        index = _REPLAY + 1 + len(self._channels)
        if index >= QUEUES:
            raise EngineError(errno.EMFILE, f"a disk has at most {QUEUES - 1} queues", self._name)
        channel = self._memory.channel(index, self._writes, self.config)
        self._channels.append(channel)
        try:
            if self._daemon is not None:
                self._start_queue(index, channel)
        except EngineError:
            pass  # it has died, and its successor will have this one too
        return channel

    async def _execute(self, command: str, arguments: dict[str, object]) -> Any:
        if self._daemon is None:
            raise EngineError(errno.ENOTCONN, self.trouble, self._name)
        return await self._daemon.execute(command, **arguments)
