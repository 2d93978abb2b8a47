# SPDX-License-Identifier: Apache-2.0
"""Directories, files and sockets that we make where somebody else has been before us."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from xvd_process import as_by_the_unit

from xvd.errors import ConfigError
from xvd.files import (
    SCRATCH,
    create_own,
    own_directory,
    remove,
    remove_scratch,
    scratch_directory,
)
from xvd.sockets import PATH_MAX, claim

NOBODY = 65534


def as_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")


def test_a_directory_is_made_for_us_alone(tmp_path: Path) -> None:
    os.close(own_directory(tmp_path / "a" / "b"))

    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("mode", "found", "allowed"),
    [(0o700, 0o755, True), (0o700, 0o770, False), (0o770, 0o770, True), (0o770, 0o1777, False)],
)
def test_a_directory_is_taken_if_others_may_not_write_there(
    tmp_path: Path, mode: int, found: int, allowed: bool
) -> None:
    where = tmp_path / "there"
    where.mkdir()
    where.chmod(found)

    if allowed:
        os.close(own_directory(where, mode=mode))
        return
    with pytest.raises(ConfigError, match="others may write in"):
        own_directory(where, mode=mode)


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    as_root()
    where = tmp_path / "theirs"
    where.mkdir()
    os.chown(where, NOBODY, NOBODY)

    with pytest.raises(ConfigError, match=f"{where} belongs to user {NOBODY}"):
        own_directory(where)


AS_A_SUPERVISOR = """
import os, sys
from pathlib import Path
from xvd.files import give, take_away

path = Path(sys.argv[1])
before = sys.argv[2]
if before:
    path.mkdir(mode=0o700)
    os.chown(path, int(before), int(before))
directory = give(path, 65534)
if os.fork() == 0:
    os.setresuid(65534, 65534, 65534)
    os.close(os.open("kept", os.O_CREAT, 0o600, dir_fd=directory))
    os._exit(0)
assert os.wait()[1] == 0
os.close(give(path, 65534))
print(os.listdir(path), path.stat().st_uid, oct(path.stat().st_mode))
take_away(path)
print(path.exists())
"""


@pytest.mark.parametrize("owner", ["", "65533", "65534"])
def test_a_directory_is_given_and_taken_by_a_root_that_may_not_ignore_modes(
    tmp_path: Path, owner: str
) -> None:
    """As the unit has it. It may be there already, as another user's, or as whose it is to be."""
    as_root()

    done = subprocess.run(
        [*as_by_the_unit(), sys.executable, "-c", AS_A_SUPERVISOR, tmp_path / "given", owner],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert (done.stdout, done.stderr) == ("['kept'] 65534 0o40750\nFalse\n", "")


@pytest.mark.parametrize("mode", [0o700, 0o750])
def test_a_root_without_powers_is_told_who_has_a_directory(tmp_path: Path, mode: int) -> None:
    """As one that serves every guest itself, after processes of their own have."""
    as_root()
    path = tmp_path / "given"
    path.mkdir()
    path.chmod(mode)
    os.chown(path, NOBODY, 0)
    code = "import pathlib, sys, xvd.files; xvd.files.give(pathlib.Path(sys.argv[1]), 0)"

    done = subprocess.run(
        ["setpriv", "--bounding-set", "-all", sys.executable, "-c", code, path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    told = f"{path} belongs to user {NOBODY}: chown -R 0 {path}, or let us have CAP_CHOWN"
    assert done.stderr.splitlines()[-1] == f"xvd.errors.ConfigError: {told}"


def test_a_file_is_made_and_never_found(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "name").symlink_to("precious")
    directory = own_directory(tmp_path)
    try:
        with pytest.raises(FileExistsError):
            create_own(directory, "name")
        remove(directory, "name")
        os.close(create_own(directory, "name"))
    finally:
        os.close(directory)

    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_a_socket_is_bound_aside_where_nobody_can_put_a_link(tmp_path: Path) -> None:
    # The name was PATH.PID: whoever may write beside it could have its mode set on any file.
    precious = tmp_path / "precious"
    precious.touch(mode=0o600)
    (tmp_path / f"socket.{os.getpid()}").symlink_to(precious)

    listener = claim(tmp_path / "socket", mode=0o666)

    assert precious.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "socket").stat().st_mode & 0o777 == 0o666
    assert sorted(os.listdir(tmp_path)) == ["precious", "socket", f"socket.{os.getpid()}"]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "socket"))
    listener.remove()
    listener.socket.close()


def test_a_path_that_no_client_can_connect_to_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too long for a socket's path"):
        claim(tmp_path / ("x" * PATH_MAX))


# ---- Directories that a killed process leaves ----


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def left_by_a_killed_process() -> Path:
    """A directory whose process was killed in it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with scratch_directory() as path:
            (path / "control").mkdir()
            os.write(write, bytes(path))
            signal.pause()
    path = Path(os.fsdecode(os.read(read, 4096)))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for fd in (read, write):
        os.close(fd)
    return path


def test_a_scratch_directory_is_ours_alone_and_goes(temporary: Path) -> None:
    with scratch_directory() as path:
        assert list(temporary.iterdir()) == [path]
        assert path.stat().st_mode & 0o777 == 0o700

    assert list(temporary.iterdir()) == []


def test_what_a_killed_process_has_left_is_removed(temporary: Path) -> None:
    path = left_by_a_killed_process()
    assert path.is_dir()

    remove_scratch()

    assert list(temporary.iterdir()) == []


def test_what_somebody_uses_stays(temporary: Path) -> None:
    with scratch_directory() as path:
        remove_scratch()

        assert path.is_dir()


@pytest.mark.parametrize("name", ["xvd-bench-1", "xvd-journals-1", "run-1", ".xvd-1"])
def test_what_has_another_name_stays(temporary: Path, name: str) -> None:
    (temporary / name).mkdir()

    remove_scratch()

    assert (temporary / name).is_dir()


def test_what_a_name_leads_to_stays(temporary: Path) -> None:
    (temporary / "home").mkdir()
    (temporary / f"{SCRATCH}1").symlink_to(temporary / "home")
    (temporary / f"{SCRATCH}2").write_text("a file")

    remove_scratch()

    assert {path.name for path in temporary.iterdir()} == {"home", f"{SCRATCH}1", f"{SCRATCH}2"}


def test_what_is_another_users_stays(temporary: Path) -> None:
    as_root()
    (temporary / f"{SCRATCH}1").mkdir()
    os.chown(temporary / f"{SCRATCH}1", NOBODY, NOBODY)

    remove_scratch()

    assert (temporary / f"{SCRATCH}1").is_dir()
