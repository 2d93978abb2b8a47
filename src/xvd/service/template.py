# SPDX-License-Identifier: Apache-2.0
"""A process that has imported everything, and forks workers at a word.

Python takes most of a second to start and to import; a fork of what has done so takes a millisecond
and shares its memory. The template is forked before there is any thread or event loop, and has
neither: it reads an order, forks, and answers with the child's descriptor.
"""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import traceback
from collections.abc import Callable, Iterator
from typing import IO, Any, Final, NoReturn

import msgspec

from xvd.errors import PeerClosed, XvdError, describe
from xvd.service.immortal import make_immortal
from xvd.service.parent import end_with_parent

logger = logging.getLogger(__name__)

_FORK: Final = b"f"
"""What the template hears for each order, beside the worker's channel and a file with the order:
settings of a thousand disks have more bytes than a message takes."""

_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What ends a worker, and not the template."""

Work = Callable[[Any, socket.socket], int]
"""What a worker does: gets its order and its end of a stream to whoever ordered it, and returns the
status that it ends with."""


class Worker:
    """A forked process, as whoever ordered it sees it. For the event loop's thread.

    channel: our end of the stream to it. ended: done when it has ended, however that came.
    """

    def __init__(self, pid: int, pidfd: int, channel: socket.socket) -> None:
        self.pid = pid
        self.channel = channel
        self._pidfd = pidfd
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(pidfd, self._has_ended)

    def _has_ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        self.channel.close()
        if not self.ended.done():
            self.ended.set_result(None)

    def signal(self, number: int) -> None:
        """Send it a signal, if it has not ended."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)


class Template:
    """Makes workers that do `work`. To be made before any thread and any event loop.

    prepare: called once in the process that forks them; what it finds out, they all have.

    The system kills workers when the template has ended, and the template when this process has,
    even one that stands still: a successor of this process finds nobody who serves what it is to
    serve. Raises OSError.
    """

    def __init__(self, work: Work, prepare: Callable[[], object] = lambda: None) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        us = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            end_with_parent(us)
            prepare()
            _serve(its, work)
        its.close()
        self._socket = ours
        self._turn = asyncio.Lock()

    async def spawn(self, order: Any) -> Worker:
        """Fork a worker for an order, which JSON can hold. Raises `PeerClosed` if the template has
        ended, and OSError if there can be no more processes or descriptors."""
        loop = asyncio.get_running_loop()
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with its:
            try:
                async with self._turn:
                    with _file_of(order) as file:
                        socket.send_fds(self._socket, [_FORK], [its.fileno(), file])
                    await _readable(loop, self._socket)
                    answer, fds, _, _ = socket.recv_fds(self._socket, 16, 1)
                if not answer:
                    raise PeerClosed("the process that forks workers has ended")
                number = int(answer)
                if not fds:
                    raise OSError(number, os.strerror(number))
            except BaseException:
                ours.close()
                raise
        ours.setblocking(False)
        return Worker(number, fds[0], ours)

    async def wait(self) -> None:
        """Return when the template has ended, whatever ended it."""
        pidfd = os.pidfd_open(self.pid)
        try:
            await _readable(asyncio.get_running_loop(), pidfd)
        finally:
            os.close(pidfd)

    def close(self) -> None:
        """End the template, and whatever workers there still are. Idempotent."""
        if self._socket.fileno() >= 0:
            self._socket.close()
            os.kill(self.pid, signal.SIGKILL)  # one that stands still would not read of it
            os.waitpid(self.pid, 0)


@contextlib.contextmanager
def _file_of(order: Any) -> Iterator[int]:
    """A file in memory that has an order; raises OSError."""
    fd = os.memfd_create("xvd-order", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(msgspec.json.encode(order))
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


async def _readable(loop: asyncio.AbstractEventLoop, one: socket.socket | int) -> None:
    ready = asyncio.Event()
    loop.add_reader(one, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(one)


# ---- In the template -----------------------------------------------------------------------------


def _serve(orders: socket.socket, work: Work) -> NoReturn:
    """Fork workers until nobody can order any more."""
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)  # whoever ordered us ends us
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # and sees for itself who of them has ended
    # Whoever counts a reference, or collects, writes to a page, which is the worker's own then.
    make_immortal()
    gc.freeze()
    with contextlib.suppress(OSError):
        while True:
            word, fds, _, _ = socket.recv_fds(orders, len(_FORK), 2)
            if not word or len(fds) < 2:
                break
            _fork(orders, fds[1], socket.socket(fileno=fds[0]), work)
    os._exit(0)


def _fork(orders: socket.socket, order: int, channel: socket.socket, work: Work) -> None:
    us = os.getpid()
    with channel, open(order, "rb") as file:
        # The template ignores these. One that comes before the worker does not is to wait for it.
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        try:
            pid = os.fork()
        except OSError as error:
            orders.send(b"%d" % (error.errno or 0))
            return
        finally:
            if os.getpid() == us:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
        if pid == 0:
            orders.close()
            _become_worker(us, file, channel, work)
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:  # it has ended already, or there are no more descriptors
        if not isinstance(error, ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        orders.send(b"%d" % (error.errno or 0))
        return
    socket.send_fds(orders, [b"%d" % pid], [pidfd])
    os.close(pidfd)


def _become_worker(template: int, file: IO[bytes], channel: socket.socket, work: Work) -> NoReturn:
    status = 1
    try:
        end_with_parent(template)
        for number in (*_ENDING, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
        with file:
            order = msgspec.json.decode(file.read())
        status = work(order, channel)
    except (XvdError, OSError) as error:
        logger.error("a worker cannot go on: %s", describe(error))
    except BaseException:  # the end of this process, whatever it is: it has no caller
        traceback.print_exc()
    finally:
        os._exit(status)
