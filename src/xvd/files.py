# SPDX-License-Identifier: Apache-2.0
"""Files of ours in directories where others may have been before: found by descriptor, never by a
name that somebody else can turn into a link.

Like errors and types, this may be imported by all.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from xvd.errors import ConfigError

_held: dict[Path, int] = {}


def hold(path: Path, fd: int) -> None:
    """Go by this descriptor where the directory is meant from now on: a process that gives up its
    rights could not find it any more. The descriptor stays open."""
    _held[path] = fd


def own_directory(path: Path, *, mode: int = 0o700) -> int:
    """Make a directory if it is not there, and open it; its descriptor is the caller's to close.

    mode: of a new one, before the umask; the group may write in one that is there if it may here.
    Raises `ConfigError` if it is not a directory of this user, or if others may write there, and
    OSError if it cannot be made.
    """
    if path not in _held:
        path.parent.mkdir(mode=mode, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=mode)
    return open_own_directory(path, group=bool(mode & stat.S_IWGRP))


def own_directory_in_own(path: Path) -> int:
    """Make a directory and the one that it is in, as `own_directory`, and open the first."""
    if path not in _held:
        os.close(own_directory(path.parent))
    return own_directory(path)


def open_own_directory(path: Path, *, group: bool = False) -> int:
    """Open a directory that nobody but this user may change; its descriptor is the caller's.

    group: its group may write there too. Raises `ConfigError` if it is another's, a link, or open
    to others, and OSError if it is not there.
    """
    held = _held.get(path)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        # Whoever holds one may be confined, and then somebody else has to answer for each open.
        fd = os.open(path, flags) if held is None else os.dup(held)
    except NotADirectoryError:
        raise ConfigError(f"{path} is not a directory, or a link to one: remove it") from None
    found = os.fstat(fd)
    if found.st_uid not in (0, os.geteuid()):  # root may do anything in any case
        os.close(fd)
        raise ConfigError(f"{path} belongs to user {found.st_uid}: choose another, or be that user")
    if found.st_mode & (stat.S_IWOTH if group else stat.S_IWOTH | stat.S_IWGRP):
        os.close(fd)
        raise ConfigError(f"others may write in {path}: chmod go-w {path}, or choose another")
    return fd


def give(path: Path, user: int, mode: int = 0o750) -> int:
    """Make a directory, if it is not there, and give it and the files in it to a user; its
    descriptor is the caller's.

    It stays our group's, so that we can open it again without the powers to ignore its mode.
    Raises `ConfigError` where somebody else may have made it, or what is another's cannot be given,
    and OSError.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    try:
        return _given(path, user, mode)
    except PermissionError:
        owner = os.lstat(path).st_uid
        raise ConfigError(
            f"{path} belongs to user {owner}: chown -R {user} {path}, or let us have CAP_CHOWN"
        ) from None


def _given(path: Path, user: int, mode: int) -> int:
    fd = _take(path)
    try:
        found = os.fstat(fd).st_uid
        if _anybodys(path.parent) and found not in (os.geteuid(), user):
            raise ConfigError(f"{path} belongs to user {found}: remove it")
        if found != user:
            _give_all(fd, user, mode)
        return fd
    except BaseException:
        os.close(fd)
        raise


def _take(path: Path) -> int:
    """Open a directory; one of another user, that we may not read, is made ours first."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except PermissionError:
        if _anybodys(path.parent):
            raise
    os.chown(path, os.geteuid(), os.getegid(), follow_symlinks=False)
    return os.open(path, flags)


def _anybodys(path: Path) -> bool:
    """Whether anybody may make and remove what is in a directory."""
    return bool(os.stat(path).st_mode & stat.S_IWOTH)


def _give_all(fd: int, user: int, mode: int) -> None:
    """Give a directory and its files to a user, the mode first: only an owner may set that."""
    for name in os.listdir(fd):
        os.chown(name, user, user, dir_fd=fd, follow_symlinks=False)
    if os.fstat(fd).st_uid == os.geteuid():
        os.fchmod(fd, mode)
    os.fchown(fd, user, os.getegid())


def take_away(path: Path) -> None:
    """Remove a directory that was given, with the files in it, if it is there."""
    with contextlib.suppress(OSError):
        os.chown(path, os.geteuid(), os.getegid(), follow_symlinks=False)
        shutil.rmtree(path)


def open_own(directory: int, name: str) -> int | None:
    """Open a regular file of ours in a directory for reading and writing; None if there is none.

    Raises `ConfigError` with what stands there instead: a link, a pipe, somebody else's file, or
    one that has a second name.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        os.lstat(name, dir_fd=directory)  # which nobody else has to answer for, as above
        fd = os.open(name, flags, dir_fd=directory)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"it cannot be opened ({error.strerror})") from None
    found = os.fstat(fd)
    whole = stat.S_ISREG(found.st_mode) and found.st_nlink == 1
    if whole and found.st_uid == os.geteuid():
        return fd
    os.close(fd)
    raise ConfigError("it is not a regular file of this user with one name")


def create_own(directory: int, name: str, *, mode: int = 0o600) -> int:
    """Make a file that was not there and open it; FileExistsError if something is."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, mode, dir_fd=directory)


def remove(directory: int, name: str) -> None:
    """Remove whatever has this name in a directory, with what is in it; nothing if there is none.

    Raises OSError for what cannot be removed.
    """
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):
        shutil.rmtree(name, dir_fd=directory)


def remove_empty(path: Path) -> None:
    """Remove a directory that has nothing in it, and that nobody holds; leave any other."""
    if path not in _held:
        with contextlib.suppress(OSError):
            path.rmdir()


SCRATCH: Final = "xvd-run-"
"""How the names of directories of `scratch_directory` begin."""


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """Make a directory for this process among the temporary files, gone at the end.

    It is locked for as long as the process lives: so `remove_scratch` knows one that a killed
    process has left.
    """
    made = Path(tempfile.mkdtemp(prefix=".xvd-"))  # until it is locked under a name of its own
    fd, path = -1, made
    try:
        fd = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # a file system without locks: then it is not removed
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path = made.rename(made.with_name(SCRATCH + made.name.removeprefix(".xvd-")))
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if fd >= 0:
            os.close(fd)


def remove_scratch() -> None:
    """Remove what killed processes of this user have left of `scratch_directory`."""
    with contextlib.suppress(OSError):
        for path in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
            with contextlib.suppress(OSError):
                _remove_if_left(path)


def _remove_if_left(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its owner has it, while it lives
        found, named = os.fstat(fd), os.lstat(path)
        if found.st_uid == os.geteuid() and os.path.samestat(found, named):
            shutil.rmtree(path)
    finally:
        os.close(fd)


def boot_id() -> str:
    """Tell this run of the kernel from any other: what is only in memory does not outlive it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
