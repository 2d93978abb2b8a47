# SPDX-License-Identifier: Apache-2.0
"""A disk's persistent state: its queues' journals, and which storage it was.

A successor finds both in the daemon's state directory. It believes neither by its name: a journal
carries the number of its ring, and storage is known by its identity. What is in a journal, and why,
says dataplane/back/journal.pxd.

The directory is memory. The space of a journal, which is mapped, is taken before it is used: a page
that cannot be had later would end the whole daemon by SIGBUS.
"""

import contextlib
import errno
import mmap
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from xvd.dataplane.back.journal import journal_fault, journal_size
from xvd.errors import BudgetError, ConfigError, EngineError
from xvd.files import (
    create_own,
    open_own,
    open_own_directory,
    own_directory_in_own,
    remove,
    remove_empty,
)

_ASIDE = ".aside"
_MAP = ".changed"
_IDENTITY_MAX = 8192
_DECISION_MAX = 1 << 16


class Journal:
    """A journal's memory, mapped from a file or, where there is none, of this process only."""

    def __init__(self, memory: bytearray | mmap.mmap) -> None:
        self.memory = memory

    def close(self) -> None:
        """Unmap it; the file stays. Not while a queue has it."""
        if isinstance(self.memory, mmap.mmap):
            self.memory.close()


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided for a disk since it was attached. image: a URI in the place of the
    toolstack's; "": that. paused: it takes no requests."""

    image: str = ""
    paused: bool = False


class DiskState:
    """The files of one disk; without a directory there are none, and nothing is taken up.

    device: the disk's directory in the store (``backend/vbd/1/51712``). The files are in the
    directory of its domain's number: another user may serve that guest.
    """

    def __init__(self, directory: Path | None, device: str) -> None:
        self._directory = None if directory is None else directory / device.split("/")[2]
        self._disk = device.removeprefix("backend/").replace("/", "-")
        self._decision = Decision()

    # ---- Journals ----

    def new_journal(self, queue: int, entries: int) -> Journal:
        """A journal for a ring that nobody served. Raises `BudgetError` or `ConfigError`."""
        if self._directory is None:
            return Journal(bytearray(journal_size(entries)))  # it dies with the process
        name = self._journal_name(queue)
        with self._open() as directory:
            remove(directory, name)
            return _create_journal(directory, name, entries)

    def find_journal(self, queue: int, ring: memoryview, entries: int, abi: int) -> Journal | None:
        """Return a predecessor's journal for this ring, or None.

        Raises `ConfigError` with the reason not to take it up; it is set aside, under its own name
        with ``.aside`` behind it, until the disk is gone.
        """
        if self._directory is None:
            return None
        name = self._journal_name(queue)
        with self._open() as directory:
            try:
                return _find_journal(directory, name, ring, entries, abi)
            except ConfigError as error:
                with contextlib.suppress(OSError):
                    remove(directory, name + _ASIDE)
                    os.rename(name, name + _ASIDE, src_dir_fd=directory, dst_dir_fd=directory)
                text = f"the journal {self._directory / name} is set aside: {error}"
                raise ConfigError(text) from None

    # ---- Identity ----

    def check_identity(self, identity: str) -> None:
        """`EngineError` if the connected guest had other storage than this; "": not to be told."""
        before = self.remembered()
        if before and identity and identity not in before:
            was = " or ".join(before)
            raise EngineError(
                errno.ESTALE,
                f"it is not what the guest is connected to: that was {was}, this is {identity}; "
                "put the other one back and start the backend again, or detach the disk",
            )

    def remember(self, *identities: str) -> None:
        """A guest is connected to this storage, or to one of these while they are exchanged. Raises
        `BudgetError` where there is no room for that, or `ConfigError`."""
        told = [identity for identity in identities if identity]
        if self._directory is None or not told or self.remembered() == told:
            return
        self._replace(self._identity_name, "\n".join(told).encode(), "the storage's identity")

    def remembered(self) -> list[str]:
        """Tell which storage a guest is connected to, or to which of some; nothing: to none."""
        with self._look() as directory, contextlib.suppress(ConfigError):
            fd = None if directory is None else open_own(directory, self._identity_name)
            if fd is not None:
                try:
                    return os.read(fd, _IDENTITY_MAX).decode("ascii", "replace").splitlines()
                finally:
                    os.close(fd)
        return []

    # ---- What was decided for the disk while its guest used it ----

    def decision(self) -> Decision:
        """Return what was decided last; nothing, if that was nothing or cannot be read."""
        if self._directory is None:
            return self._decision
        with contextlib.suppress(OSError, ConfigError, msgspec.MsgspecError), self._look() as place:
            fd = None if place is None else open_own(place, self._decision_name)
            if fd is not None:
                with open(fd, "rb") as file:
                    return msgspec.json.decode(file.read(_DECISION_MAX), type=Decision)
        return Decision()

    def decide(self, decision: Decision) -> None:
        """Keep it until the disk is gone. Raises `BudgetError` where there is no room for that, or
        `ConfigError`."""
        self._decision = decision
        if self._directory is not None:
            self._replace(self._decision_name, msgspec.json.encode(decision), "what was decided")

    # ---- What was changed since a backup (tracking.py) ----

    def new_map(self, name: str, size: int) -> mmap.mmap | bytearray:
        """Memory of zeros for a map, in a file where there is a directory. Raises `BudgetError` or
        `ConfigError`."""
        if self._directory is None:
            return bytearray(size)
        with self._open() as directory:
            remove(directory, self._map_name(name))
            return _create_mapped(directory, self._map_name(name), size, f"a map of {size} bytes")

    def find_maps(self) -> dict[str, mmap.mmap]:
        """Each map that a predecessor left, by its name; one that cannot be mapped is removed."""
        found: dict[str, mmap.mmap] = {}
        pattern = re.compile(rf"{re.escape(self._disk)}-(.+){re.escape(_MAP)}")
        with self._look() as directory:
            names = [] if directory is None else os.listdir(directory)
            for match in filter(None, map(pattern.fullmatch, names)):
                assert directory is not None
                try:
                    fd = open_own(directory, match[0])
                    assert fd is not None
                    with open(fd, "r+b") as file:
                        found[match[1]] = mmap.mmap(file.fileno(), 0)
                except (ConfigError, OSError, ValueError):  # an empty one cannot be mapped
                    remove(directory, match[0])
        return found

    def remove_map(self, name: str) -> None:
        """Forget a map."""
        self._remove(re.escape(self._map_name(name)))

    def _map_name(self, name: str) -> str:
        return f"{self._disk}-{name}{_MAP}"

    def _replace(self, name: str, content: bytes, what: str) -> None:
        """Let a file have this content, all of it or what it had."""
        aside = name + ".new"
        with self._open() as directory:
            remove(directory, aside)
            fd = create_own(directory, aside)
            try:
                os.write(fd, content)
            except OSError as error:
                os.unlink(aside, dir_fd=directory)
                raise _no_room(directory, what, error) from None
            finally:
                os.close(fd)
            os.rename(aside, name, src_dir_fd=directory, dst_dir_fd=directory)

    # ---- The end ----

    def disconnected(self) -> None:
        """Forget the rings of a frontend that has closed: nobody takes them up, and the next one
        may have any storage. What was set aside stays."""
        self._remove(rf"{re.escape(self._disk)}(-q\d+\.ring|\.storage)")

    def gone(self) -> None:
        """The disk is no more: nothing of it stays, nor a directory without files."""
        self._decision = Decision()
        kept = rf"(-q\d+\.ring|\.storage|\.decided|-.+{re.escape(_MAP)})"
        self._remove(rf"{re.escape(self._disk)}{kept}({re.escape(_ASIDE)}|\.new)?")
        if self._directory is not None:
            remove_empty(self._directory)

    def end(self) -> None:
        """The disk is no more, and what is still being done with it leaves nothing either."""
        self.gone()
        self._directory = None

    def _remove(self, pattern: str) -> None:
        with contextlib.suppress(OSError, ConfigError), self._look() as directory:
            if directory is not None:
                for name in filter(re.compile(pattern).fullmatch, os.listdir(directory)):
                    remove(directory, name)

    def _journal_name(self, queue: int) -> str:
        return f"{self._disk}-q{queue}.ring"

    @property
    def _identity_name(self) -> str:
        return f"{self._disk}.storage"

    @property
    def _decision_name(self) -> str:
        return f"{self._disk}.decided"

    @contextlib.contextmanager
    def _look(self) -> Iterator[int | None]:
        """Open the directory if it is there already."""
        directory = None
        if self._directory is not None:
            with contextlib.suppress(FileNotFoundError):
                directory = open_own_directory(self._directory)
        try:
            yield directory
        finally:
            if directory is not None:
                os.close(directory)

    @contextlib.contextmanager
    def _open(self) -> Iterator[int]:
        assert self._directory is not None
        directory = own_directory_in_own(self._directory)
        try:
            yield directory
        finally:
            os.close(directory)


# ---- The file of a journal ---------------------------------------------------------------------


def _create_journal(directory: int, name: str, entries: int) -> Journal:
    """A new one in a directory where nothing has this name.

    Raises `BudgetError` if its file system has no room for it, and then leaves nothing.
    """
    size = journal_size(entries)
    return Journal(_create_mapped(directory, name, size, f"a journal of {size} bytes"))


def _create_mapped(directory: int, name: str, size: int, what: str) -> mmap.mmap:
    """A new file, mapped, whose space is taken; `BudgetError` if there is none, and no file."""
    fd = create_own(directory, name)
    try:
        os.posix_fallocate(fd, 0, size)
        return mmap.mmap(fd, size)
    except OSError as error:
        os.unlink(name, dir_fd=directory)
        raise _no_room(directory, what, error) from None
    finally:
        os.close(fd)


def _no_room(directory: int, what: str, error: OSError) -> BudgetError:
    """Say so where the state directory's file system cannot take something."""
    where = os.readlink(f"/proc/self/fd/{directory}")
    return BudgetError(
        f"{where} has no room for {what} ({error.strerror}): free some space there, and let the "
        "frontend connect again",
        "state",
    )


def _find_journal(
    directory: int, name: str, ring: memoryview, entries: int, abi: int
) -> Journal | None:
    """The one that a predecessor left for this ring; None if there is none.

    Raises `ConfigError` with the reason not to take up what is there.
    """
    fd = open_own(directory, name)
    if fd is None:
        return None
    size = journal_size(entries)
    try:
        if os.fstat(fd).st_size != size:
            raise ConfigError(f"it has {os.fstat(fd).st_size} bytes instead of {size}")
        os.posix_fallocate(fd, 0, size)
        journal = Journal(mmap.mmap(fd, size))
    except OSError as error:
        raise ConfigError(f"it cannot be mapped ({error.strerror})") from None
    finally:
        os.close(fd)
    if fault := journal_fault(journal.memory, ring, entries, abi):
        journal.close()
        raise ConfigError(fault)
    return journal
