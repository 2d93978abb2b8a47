# SPDX-License-Identifier: Apache-2.0
"""What a disk leaves on a file system: made whole or not at all, and never through a link."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from xvd.backend.state import DiskState
from xvd.blkif.abi import Abi
from xvd.dataplane.back.journal import journal_size
from xvd.errors import BudgetError, ConfigError, EngineError

DISK = "backend/vbd/1/51712"
NAME = "vbd-1-51712-q0.ring"
ENTRIES = 32
RING = memoryview(bytearray(4096))


def find(state: DiskState) -> object:
    return state.find_journal(0, RING, ENTRIES, Abi.X86_64.number)


def files(directory: Path) -> list[str]:
    """The names of all files in it, and in the directories of domains."""
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "state" / "backend-0"


@pytest.fixture
def small(directory: Path) -> Iterator[Path]:
    """A directory whose file system has 16 KiB."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts file systems")
    directory.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", directory], check=True)
    directory.chmod(0o700)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


def test_a_journal_has_its_space_before_it_is_used(directory: Path) -> None:
    DiskState(directory, DISK).new_journal(0, ENTRIES)

    found = (directory / "1" / NAME).stat()
    assert found.st_size == journal_size(ENTRIES)
    assert found.st_blocks * 512 >= found.st_size
    assert directory.stat().st_mode & 0o777 == 0o700


def test_a_full_file_system_is_told_and_nothing_is_left(small: Path) -> None:
    (small / "fill").write_bytes(bytes(12 << 10))

    with pytest.raises(BudgetError, match=r"has no room for a journal of \d+ bytes"):
        DiskState(small, DISK).new_journal(0, ENTRIES)

    assert files(small) == ["fill"]


def test_a_full_file_system_takes_no_identity(small: Path) -> None:
    (small / "fill").write_bytes(bytes(16 << 10))

    with pytest.raises(BudgetError, match="no room for the storage's identity"):
        DiskState(small, DISK).remember("file 1:2 inode 3")

    assert files(small) == ["fill"]


def plant(path: Path, kind: str, precious: Path) -> None:
    """Put there what is no journal of ours."""
    precious.write_bytes(b"precious" * 1000)
    if kind == "directory":
        path.mkdir()
        (path / "inside").touch()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(precious)
    elif kind == "second name":
        path.hardlink_to(precious)
    elif kind == "other user":
        path.write_bytes(bytes(journal_size(ENTRIES)))
        os.chown(path, 65534, 65534)
    else:
        path.write_bytes(b"short")


KINDS = ["directory", "pipe", "link", "second name", "other user", "short"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_journal_is_set_aside(directory: Path, kind: str) -> None:
    if kind == "other user" and os.geteuid() != 0:
        pytest.skip("only root gives files away")
    own = directory / "1"
    own.mkdir(mode=0o700, parents=True)
    precious = directory.parent / "precious"
    plant(own / NAME, kind, precious)
    state = DiskState(directory, DISK)

    with pytest.raises(ConfigError, match="is set aside"):
        find(state)
    state.new_journal(0, ENTRIES)

    assert precious.read_bytes() == b"precious" * 1000
    assert sorted(os.listdir(own)) == [NAME, NAME + ".aside"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_set_aside_makes_room_for_the_next(directory: Path, kind: str) -> None:
    if kind == "other user" and os.geteuid() != 0:
        pytest.skip("only root gives files away")
    own = directory / "1"
    own.mkdir(mode=0o700, parents=True)
    plant(own / f"{NAME}.aside", "directory", directory.parent / "precious")
    plant(own / NAME, kind, directory.parent / "precious")
    state = DiskState(directory, DISK)

    with pytest.raises(ConfigError, match="is set aside"):
        find(state)
    state.gone()

    assert os.listdir(directory) == []  # nor the directory that they were in


@pytest.mark.parametrize("device", ["vbd/11/51712", "vbd/1/517120", "vbd3/1/51712"])
def test_the_files_of_other_disks_stay(directory: Path, device: str) -> None:
    name = device.replace("/", "-")
    other = DiskState(directory, f"backend/{device}")
    other.new_journal(0, ENTRIES)
    other.remember("file 1:2 inode 3")
    state = DiskState(directory, "backend/vbd/1/51712")
    state.new_journal(0, ENTRIES)

    state.gone()

    assert files(directory) == [f"{name}-q0.ring", f"{name}.storage"]


@pytest.mark.parametrize("what", ["link", "open to others"])
def test_a_directory_that_is_not_ours_alone_is_refused(directory: Path, what: str) -> None:
    directory.parent.mkdir(parents=True)
    if what == "link":
        (directory.parent / "elsewhere").mkdir()
        directory.symlink_to(directory.parent / "elsewhere")
    else:
        directory.mkdir()
        directory.chmod(0o777)

    with pytest.raises(ConfigError, match=str(directory)):
        DiskState(directory, DISK).new_journal(0, ENTRIES)


def test_a_guest_keeps_the_storage_that_it_is_connected_to(directory: Path) -> None:
    DiskState(directory, DISK).remember("file 8:1 inode 5")
    successor = DiskState(directory, DISK)

    successor.check_identity("file 8:1 inode 5")
    with pytest.raises(EngineError, match=r"that was file 8:1 inode 5, this is file 8:1 inode 6"):
        successor.check_identity("file 8:1 inode 6")


def test_storage_may_be_either_of_two_while_they_are_exchanged(directory: Path) -> None:
    DiskState(directory, DISK).remember("file 8:1 inode 5", "file 8:1 inode 6")

    successor = DiskState(directory, DISK)
    successor.check_identity("file 8:1 inode 5")
    successor.check_identity("file 8:1 inode 6")
    with pytest.raises(EngineError, match="that was file 8:1 inode 5 or file 8:1 inode 6, this is"):
        successor.check_identity("file 8:1 inode 7")


def test_the_next_guest_may_have_any_storage(directory: Path) -> None:
    state = DiskState(directory, DISK)
    state.remember("file 8:1 inode 5")

    state.disconnected()

    state.check_identity("file 8:1 inode 6")
