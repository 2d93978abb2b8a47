# SPDX-License-Identifier: Apache-2.0
"""One qemu-storage-daemon: a child of ours that opens a disk and serves it by vhost-user-blk.

Nobody else can reach it: its sockets have no names once it has them. It is told to end when the
thread that started it does, and then it writes out what it has.
"""

import asyncio
import contextlib
import errno
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from typing import IO, Any, Final

from qemu.qmp import QMPClient, QMPError

from xvd.engines.qemu.nodes import NODE, Nodes
from xvd.engines.qemu.vhost_user import BlkConfig, Session
from xvd.errors import EngineError
from xvd.files import scratch_directory

QUEUES: Final = 64
"""Virtqueues of an export: those that nobody uses cost nothing."""
_PROGRAM: Final = "qemu-storage-daemon"
_ENDS_S: Final = 30.0
"""How long it may write out what it has."""
_PREFIX: Final = re.compile(rf"^{_PROGRAM}: (--\w+ \{{.*\}}: )?")


@contextlib.contextmanager
def _vhost_sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A socket that listens and one that has connected to it; its name is gone afterwards."""
    listener, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    with listener, scratch_directory() as place:
        listener.bind(f"{place}/vhost")
        listener.listen(1)
        client.connect(f"{place}/vhost")
        try:
            yield listener, client
        except BaseException:
            client.close()
            raise


def _program(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise EngineError(
            errno.ENOENT,
            f"{name} is not here, which such storage needs; on Debian: apt-get install {package}",
        )
    return found


def _words(nodes: Nodes, listener: int, qmp: int, writable: bool) -> list[str]:
    export = {
        "type": "vhost-user-blk",
        "id": "export",
        "node-name": NODE,
        "writable": writable,
        "num-queues": QUEUES,
        "addr": {"type": "fd", "str": str(listener)},
    }
    words = [_program("setpriv", "util-linux"), "--pdeathsig", "TERM", "--"]
    words.append(_program(_PROGRAM, "qemu-system-common"))
    for secret in nodes.objects:
        words += ["--object", json.dumps(secret)]
    words += ["--blockdev", json.dumps(nodes.blockdev), "--export", json.dumps(export)]
    return [*words, "--chardev", f"socket,id=qmp,fd={qmp}", "--monitor", "chardev=qmp"]


class Daemon:
    """A running one, by `start`. For the event loop's thread, which must outlive it."""

    def __init__(self, process: subprocess.Popen[bytes], client: socket.socket, said: IO[bytes]):
        self._process = process
        self._said = said
        self._qmp = QMPClient()
        self.session = Session(client)
        self.pidfd = os.pidfd_open(process.pid)
        """Readable once it is dead."""

    @classmethod
    async def start(cls, nodes: Nodes) -> tuple["Daemon", BlkConfig]:
        """Start it, and ask it what the disk is. Raises `EngineError` with what it has said."""
        daemon, ours = cls._spawn(nodes)
        try:
            config = await asyncio.to_thread(daemon.session.begin)
            await daemon._qmp.connect(ours)
        except (EngineError, QMPError, OSError) as error:
            ours.close()
            raise await daemon._failed(error, nodes) from None
        return daemon, config

    @classmethod
    def _spawn(cls, nodes: Nodes) -> tuple["Daemon", socket.socket]:
        """Start the process; our end of its monitor. By the thread whose end it is to notice."""
        writable = not nodes.blockdev["read-only"]
        with contextlib.ExitStack() as undo:
            said = undo.enter_context(tempfile.TemporaryFile())
            ours, its = socket.socketpair()
            undo.enter_context(ours)
            with _vhost_sockets() as (listener, client), its:
                fds = (listener.fileno(), its.fileno())
                process = subprocess.Popen(
                    _words(nodes, *fds, writable), pass_fds=fds, stdin=subprocess.DEVNULL,
                    stdout=said, stderr=said, start_new_session=True,  # no Ctrl-C of ours
                )  # fmt: skip
            undo.pop_all()
        return cls(process, client, said), ours

    async def _failed(self, error: Exception, nodes: Nodes) -> EngineError:
        """Find out why it could not be started; it is gone afterwards."""
        await self._end()
        with self._said:
            self._said.seek(0)
            lines = self._said.read().decode(errors="replace").splitlines()
        said = "; ".join(_PREFIX.sub("", line) for line in lines) or str(error)
        if "Unknown driver" in said or "Unknown protocol" in said:
            said += "; on Debian it may be in qemu-block-extra: apt-get install qemu-block-extra"
        if " lock" in said:
            return EngineError(errno.EBUSY, f"it is in use: {said}", nodes.path or None)
        return EngineError(errno.EINVAL, said, nodes.path or None)

    async def execute(self, command: str, **arguments: object) -> Any:
        """Give a QMP command; what it returns. Raises `EngineError` with what it has said."""
        try:
            return await self._qmp.execute(command, arguments)
        except QMPError as error:
            raise EngineError(errno.EIO, str(error)) from None

    async def dead(self) -> None:
        """Wait for its death."""
        loop, gone = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self.pidfd, gone.set)
        try:
            await gone.wait()
        finally:
            loop.remove_reader(self.pidfd)

    def end_soon(self) -> None:
        """Let it write out what it has, and end; `stop` is due when it is `dead`."""
        self._process.terminate()

    async def stop(self) -> None:
        """Let it write out what it has, and end; it is gone afterwards. Idempotent."""
        if self.pidfd >= 0:
            await self._end()
            self._said.close()

    async def _end(self) -> None:
        self.session.close()
        self._process.terminate()
        try:
            async with asyncio.timeout(_ENDS_S):
                await self.dead()
        except TimeoutError:
            self._process.kill()
            await self.dead()
        self._process.wait()
        with contextlib.suppress(QMPError, OSError, EOFError):  # it has hung up first
            await self._qmp.disconnect()
        os.close(self.pidfd)
        self.pidfd = -1
