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
from pathlib import Path
from typing import Final

from xvd.errors import PeerClosed, XenstoreError
from xvd.machine.xs.client import XenstoreClient

SOCKETS: Final = (Path("/run/xenstored/socket"), Path("/var/run/xenstored/socket"))
DEVICES: Final = (Path("/dev/xen/xenbus"), Path("/proc/xen/xenbus"))

MESSAGE_MAX: Final = 4096
"""Most bytes of one message, header included (Linux: drivers/xen/xenbus/xenbus_dev_frontend.c)."""


class XenbusDevice:
    """`Reader` and `Writer` over the kernel's device; in the event loop's thread.

    Raises OSError if the device cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        self._error: OSError | None = None
        self._reader = asyncio.StreamReader()
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
        else:
            self._reader.feed_eof()
            asyncio.get_running_loop().remove_reader(self._fd)

    async def read(self, n: int, /) -> bytes:
        """Some bytes, at most `n`; none at the end."""
        return await self._reader.read(n)

    def write(self, data: bytes, /) -> None:
        """Hand over one whole message. What fails is raised by the next `drain`.

        Raises `XenstoreError` E2BIG for a message that the device does not carry.
        """
        if len(data) > MESSAGE_MAX:
            raise XenstoreError("E2BIG", f"{len(data)} bytes in a message, at most {MESSAGE_MAX}")
        if self._fd < 0:
            return
        try:
            os.write(self._fd, data)
        except OSError as error:
            self._error = error

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
        """It is closed when `close` returns."""


async def connect() -> XenstoreClient:
    """A new connection to this domain's xenstore; `PeerClosed` if there is none."""
    for path in SOCKETS:
        if path.is_socket():
            return await XenstoreClient.connect(path)
    for path in DEVICES:
        try:
            device = XenbusDevice(path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
                raise PeerClosed(f"cannot reach xenstore: {path}: {error.strerror}") from None
            continue
        return XenstoreClient(device, device)
    raise PeerClosed("no xenstore here: in dom0 start xenstored; elsewhere this is no Xen domain")
