# SPDX-License-Identifier: Apache-2.0
"""A queue's journal as a file: persistent state in memory, on a file system made of memory.

dataplane/back/journal.pxd says what is in it and why. Here is only how it is had: its space is
taken before it is used, as a page that cannot be had later would end the whole daemon by SIGBUS.
"""

import mmap
import os

from xvd.dataplane.back.journal import journal_fault, journal_size
from xvd.errors import BudgetError, ConfigError
from xvd.files import create_own, open_own


class Journal:
    """A journal's memory, mapped from a file or, where there is none, of this process only."""

    def __init__(self, memory: bytearray | mmap.mmap) -> None:
        self.memory = memory

    def close(self) -> None:
        """Unmap it; the file stays. Not while a queue has it."""
        if isinstance(self.memory, mmap.mmap):
            self.memory.close()


def volatile_journal(entries: int) -> Journal:
    """Make a journal that dies with the process, for a ring of so many entries."""
    return Journal(bytearray(journal_size(entries)))


def create_journal(directory: int, name: str, entries: int) -> Journal:
    """A new one in a directory where nothing has this name.

    Raises `BudgetError` if its file system has no room for it, and then leaves nothing.
    """
    size = journal_size(entries)
    fd = create_own(directory, name)
    try:
        os.posix_fallocate(fd, 0, size)
        return Journal(mmap.mmap(fd, size))
    except OSError as error:
        os.unlink(name, dir_fd=directory)
        raise no_room(directory, f"a journal of {size} bytes", error) from None
    finally:
        os.close(fd)


def no_room(directory: int, what: str, error: OSError) -> BudgetError:
    """Say so where the state directory's file system cannot take something."""
    where = os.readlink(f"/proc/self/fd/{directory}")
    return BudgetError(
        f"{where} has no room for {what} ({error.strerror}): free some space there, and let the "
        "frontend connect again",
        "state",
    )


def find_journal(
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
