# SPDX-License-Identifier: Apache-2.0
"""Systemd as a daemon sees it."""

import socket
from pathlib import Path


class Manager:
    """A socket on which a service tells its state."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(30)

    def hear(self, wanted: str) -> str:
        """Wait until that is told; all that came with it."""
        while wanted not in (told := self._socket.recv(4096).decode()).split("\n"):
            pass
        return told

    def next(self) -> str:
        """What is told next."""
        return self._socket.recv(4096).decode()

    def close(self) -> None:
        self._socket.close()
