# SPDX-License-Identifier: Apache-2.0
"""Unix sockets that servers listen on: claimed without stealing, removed without stealing.

Like errors and types, this may be imported by all.
"""

import contextlib
import errno
import os
import socket
import stat
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from xvd.errors import ConfigError

_BACKLOG = 128

PATH_MAX = 107
"""Bytes of a socket's path that a client can connect to (unix(7): sun_path, with its end)."""


@dataclass(frozen=True, slots=True)
class UnixListener:
    """A listening socket at a path. `inode` is how the path is known to be still ours."""

    socket: socket.socket
    path: Path
    inode: int

    def remove(self) -> None:
        """Remove the path, unless somebody has put something else there. The socket stays open."""
        try:
            if self.path.stat().st_ino == self.inode:
                self.path.unlink()
        except FileNotFoundError:
            return


def claim(
    path: str | os.PathLike[str], *, mode: int = 0o660, kind: int = socket.SOCK_STREAM
) -> UnixListener:
    """Listen at `path`; `kind` is SOCK_STREAM or SOCK_SEQPACKET.

    A socket that nobody answers is replaced. Raises `ConfigError` if a live server answers there,
    if `path` is no socket, or if none can be made there.
    """
    where = Path(path).absolute()
    if len(os.fsencode(where)) > PATH_MAX:
        raise ConfigError(f"{where}: too long for a socket's path; choose a shorter one")
    _refuse_if_taken(where, kind)
    listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
    try:
        return UnixListener(listener, where, _bind_aside(listener, where, mode))
    except OSError as error:
        listener.close()
        text = error.strerror or str(error)
        raise ConfigError(f"{where}: cannot listen there ({text}); name another path") from error


def remove_dead(paths: Iterable[Path], kind: int = socket.SOCK_STREAM) -> None:
    """Remove each of these sockets that nobody answers, and leave what cannot be removed."""
    for path in paths:
        with contextlib.suppress(OSError):
            if path.is_socket() and _is_dead(path, kind):
                path.unlink()


def _is_dead(path: Path, kind: int) -> bool:
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        return probe.connect_ex(str(path)) == errno.ECONNREFUSED


def _refuse_if_taken(path: Path, kind: int) -> None:
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # nothing there, or not to be looked at: binding will say why
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path} is not a socket: name another path, or remove it first")
    if not _is_dead(path, kind):
        raise ConfigError(f"{path}: a server answers there already: stop it, or name another path")


def _bind_aside(listener: socket.socket, path: Path, mode: int) -> int:
    # Bound in a directory that only we may enter, and moved out of it: nobody can connect before
    # the mode is right, nobody can put a link in its way, and a dead server's socket is replaced in
    # one step. Bound by a short name, as a socket's path has 107 bytes at most.
    room = tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)
    aside = Path(room) / "s"
    try:
        directory = os.open(room, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            listener.bind(f"/proc/self/fd/{directory}/s")
        finally:
            os.close(directory)
        aside.chmod(mode)
        listener.listen(_BACKLOG)
        inode = aside.stat().st_ino
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)
        os.rmdir(room)
    return inode
