# SPDX-License-Identifier: Apache-2.0
"""The way to xenstore on real Xen: xenstored's socket in its own domain, the kernel elsewhere.

Both carry the same messages. The socket is the standard client's own transport. The kernel's
device takes each message as one write, at most 4096 bytes with its header, and never blocks longer
than queueing it takes; it is read through the event loop.
"""

import asyncio
import contextlib
import errno
import os
from collections import deque
from pathlib import Path
from typing import Final

from xvd.errors import PeerClosed, XenstoreError
from xvd.machine.xs.client import Reader, Writer, XenstoreClient, open_streams
from xvd.machine.xs.messages import HEADER, MessageType

SOCKETS: Final = (Path("/run/xenstored/socket"), Path("/var/run/xenstored/socket"))
DEVICES: Final = (Path("/dev/xen/xenbus"), Path("/proc/xen/xenbus"))

MESSAGE_MAX: Final = 4096
"""Most bytes of one message, header included (Linux: drivers/xen/xenbus/xenbus_dev_frontend.c)."""


class XenbusDevice:
    """`Reader` and `Writer` over the kernel's device; in the event loop's thread.

    One request at a time: Linux keeps a request's payload in the descriptor's one buffer until its
    own thread has sent it, so that a second one would overwrite the first (6.1 and 6.12,
    xenbus_dev_request_and_reply). Others wait here for the reply.

    Raises OSError if the device cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        self._error: OSError | None = None
        self._reader = asyncio.StreamReader()
        self._waiting: deque[bytes] = deque()
        self._answered = True
        self._header = b""
        self._rest = 0
        asyncio.get_running_loop().add_reader(self._fd, self._readable)

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, MESSAGE_MAX)
        except BlockingIOError:
            return
        except OSError as error:
            self._error = error
            data = b""
        if data:
            self._reader.feed_data(data)
            self._follow(data)
            self._send()
        else:
            self._reader.feed_eof()
            asyncio.get_running_loop().remove_reader(self._fd)

    def _follow(self, data: bytes) -> None:
        """See where messages begin: any but an event is the reply to what was sent."""
        while data:
            skipped = min(self._rest, len(data))
            self._rest -= skipped
            data = data[skipped:]
            wanted = HEADER.size - len(self._header)
            if self._rest or not data:
                return
            self._header, data = self._header + data[:wanted], data[wanted:]
            if len(self._header) == HEADER.size:
                message_type, _, _, self._rest = HEADER.unpack(self._header)
                self._header = b""
                self._answered |= message_type != MessageType.WATCH_EVENT

    def _send(self) -> None:
        if not self._waiting or not self._answered or self._fd < 0:
            return
        self._answered = False
        try:
            os.write(self._fd, self._waiting.popleft())
        except OSError as error:
            self._error = error
            self._reader.feed_eof()

    async def read(self, n: int, /) -> bytes:
        """Return some bytes, at most `n`; none at the end."""
        return await self._reader.read(n)

    def write(self, data: bytes, /) -> None:
        """Hand over one whole message. What fails is raised by the next `drain`.

        Raises `XenstoreError` E2BIG for a message that the device does not carry.
        """
        if len(data) > MESSAGE_MAX:
            raise XenstoreError("E2BIG", f"{len(data)} bytes in a message, at most {MESSAGE_MAX}")
        self._waiting.append(data)
        self._send()

    async def drain(self) -> None:
        """Raise the OSError of a write that failed."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Close the device: the kernel takes back our watches and aborts our transactions."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        with contextlib.suppress(RuntimeError):  # the event loop may be closed already
            asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)
        self._reader.feed_eof()

    async def wait_closed(self) -> None:
        """Return at once: it is closed when `close` returns."""


async def connect() -> XenstoreClient:
    """A new connection to this domain's xenstore; `PeerClosed` if there is none."""
    return XenstoreClient(*await streams())


async def streams() -> tuple[Reader, Writer]:
    """Open the two ways of a new connection; `PeerClosed` if there is no xenstore."""
    for path in SOCKETS:
        if path.is_socket():
            return await open_streams(path)
    for path in DEVICES:
        try:
            device = XenbusDevice(path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
                raise PeerClosed(f"cannot reach xenstore: {path}: {error.strerror}") from None
            continue
        return device, device
    raise PeerClosed("no xenstore here: in dom0 start xenstored; elsewhere this is no Xen domain")
