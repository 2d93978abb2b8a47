# SPDX-License-Identifier: Apache-2.0
"""A disk's persistent state: its queues' journals, and which storage it
was.

A successor finds both in the daemon's state directory. It believes neither by its name: a journal
carries the number of its ring, and storage is known by its identity.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from xvd.backend.journal import Journal, create_journal, find_journal, no_room, volatile_journal
from xvd.errors import ConfigError, EngineError
from xvd.files import create_own, open_own, own_directory, remove

_ASIDE = ".aside"
_IDENTITY_MAX = 256


class DiskState:
    """The files of one disk; without a directory there are none, and nothing is taken up.

    device: the disk's directory in the store (``backend/vbd/1/51712``).
    """

    def __init__(self, directory: Path | None, device: str) -> None:
        self._directory = directory
        self._disk = device.removeprefix("backend/").replace("/", "-")

    # ---- Journals ----

    def new_journal(self, queue: int, entries: int) -> Journal:
        """A journal for a ring that nobody served. Raises `BudgetError` or `ConfigError`."""
        if self._directory is None:
            return volatile_journal(entries)
        name = self._journal_name(queue)
        with self._open() as directory:
            remove(directory, name)
            return create_journal(directory, name, entries)

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
                return find_journal(directory, name, ring, entries, abi)
            except ConfigError as error:
                with contextlib.suppress(OSError):
                    remove(directory, name + _ASIDE)
                    os.rename(name, name + _ASIDE, src_dir_fd=directory, dst_dir_fd=directory)
                text = f"the journal {self._directory / name} is set aside: {error}"
                raise ConfigError(text) from None

    # ---- Identity ----

    def check_identity(self, identity: str) -> None:
        """`EngineError` if the connected guest had other storage than this; "": not to be told."""
        before = self._remembered()
        if before and identity and before != identity:
            raise EngineError(
                errno.ESTALE,
                f"it is not what the guest is connected to: that was {before}, this is {identity}; "
                "put the other one back and start the backend again, or detach the disk",
            )

    def remember(self, identity: str) -> None:
        """A guest is connected to this storage. Raises `BudgetError` where there is no room for
        that, or `ConfigError`."""
        if self._directory is None or not identity or self._remembered() == identity:
            return
        name, aside = self._identity_name, self._identity_name + ".new"
        with self._open() as directory:
            remove(directory, aside)
            fd = create_own(directory, aside)
            try:
                os.write(fd, identity.encode())
            except OSError as error:
                os.unlink(aside, dir_fd=directory)
                raise no_room(directory, "the storage's identity", error) from None
            finally:
                os.close(fd)
            os.rename(aside, name, src_dir_fd=directory, dst_dir_fd=directory)

    def _remembered(self) -> str:
        if self._directory is None or not self._directory.exists():
            return ""
        with self._open() as directory, contextlib.suppress(ConfigError):
            fd = open_own(directory, self._identity_name)
            if fd is not None:
                try:
                    return os.read(fd, _IDENTITY_MAX).decode("ascii", "replace")
                finally:
                    os.close(fd)
        return ""

    # ---- The end ----

    def disconnected(self) -> None:
        """Forget the rings of a frontend that has closed: nobody takes them up, and the next one
        may have any storage. What was set aside stays."""
        self._remove(rf"{re.escape(self._disk)}(-q\d+\.ring|\.storage)")

    def gone(self) -> None:
        """The disk is no more: nothing of it stays."""
        self._remove(rf"{re.escape(self._disk)}(-q\d+\.ring|\.storage)({re.escape(_ASIDE)}|\.new)?")

    def _remove(self, pattern: str) -> None:
        if self._directory is None or not self._directory.exists():
            return
        with contextlib.suppress(OSError, ConfigError), self._open() as directory:
            for name in os.listdir(directory):
                if re.fullmatch(pattern, name):
                    remove(directory, name)

    def _journal_name(self, queue: int) -> str:
        return f"{self._disk}-q{queue}.ring"

    @property
    def _identity_name(self) -> str:
        return f"{self._disk}.storage"

    @contextlib.contextmanager
    def _open(self) -> Iterator[int]:
        assert self._directory is not None
        directory = own_directory(self._directory)
        try:
            yield directory
        finally:
            os.close(directory)
