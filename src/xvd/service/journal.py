# SPDX-License-Identifier: Apache-2.0
"""Log lines for systemd's journal, with their fields, by its native protocol.

A line is one datagram of ``NAME=value`` lines; a value that has a line break of its own is preceded
by its length instead (https://systemd.io/JOURNAL_NATIVE_PROTOCOL). So a guest's text is never taken
for a field.
"""

import logging
import os
import socket
import struct
import sys
from typing import IO, Final

SOCKET: Final = "/run/systemd/journal/socket"
MESSAGE_MAX: Final = 48 << 10
"""Bytes of a text. A datagram has room for more (net.core.wmem_default), but not for anything."""

_PRIORITIES: Final = (
    (logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6),
)  # fmt: skip
_DEBUG: Final = 7
_FIELDS: Final = ("xvd_domain", "xvd_vdev", "xvd_event")
"""What `loglimit.fields` gives a line, and the names of the fields in small letters."""


def handler_of(stream: IO[str]) -> "JournalHandler | None":
    """A handler for the journal, if `stream` is one that systemd has connected to it.

    ``$JOURNAL_STREAM`` is the device and inode of that (systemd.exec(5)); a stream that was
    redirected since is another one.
    """
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return None
    if os.environ.get("JOURNAL_STREAM") != f"{found.st_dev}:{found.st_ino}":
        return None
    return JournalHandler()


class JournalHandler(logging.Handler):
    """Sends each line to the journal; any thread. Where that takes none, to stderr as plain text.

    It never waits: a journal that hangs must not stop disks, so a line for which its socket has no
    room is lost.
    """

    def __init__(self, path: str = SOCKET) -> None:
        super().__init__()
        self._path = path
        self._socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )

    def emit(self, record: logging.LogRecord) -> None:
        """Send a line with its fields."""
        text = self.format(record)
        try:
            self._socket.sendto(datagram(record, text), self._path)
        except BlockingIOError:
            pass
        except OSError:
            sys.stderr.write(f"<{_priority(record)}>xvd: {text}\n")

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        super().close()


def datagram(record: logging.LogRecord, text: str) -> bytes:
    """Return a line as the journal takes it: its text, its priority, and what it is about."""
    values = {
        "MESSAGE": text,
        "PRIORITY": str(_priority(record)),
        "SYSLOG_IDENTIFIER": "xvd",
        "XVD_LOGGER": record.name,
        **{name.upper(): str(getattr(record, name, "")) for name in _FIELDS},
    }
    return b"".join(_field(name, value) for name, value in values.items() if value)


def _field(name: str, value: str) -> bytes:
    data = value.encode("utf-8", "replace")[:MESSAGE_MAX]
    if b"\n" not in data:
        return b"%s=%s\n" % (name.encode(), data)
    return b"%s\n%s%s\n" % (name.encode(), struct.pack("<Q", len(data)), data)


def _priority(record: logging.LogRecord) -> int:
    """Return the syslog level of a line."""
    return next((number for level, number in _PRIORITIES if record.levelno >= level), _DEBUG)
