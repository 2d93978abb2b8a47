# SPDX-License-Identifier: Apache-2.0
"""``xvd host`` and the daemons in directories that are not ours alone."""

import os
from pathlib import Path

import pytest
from xvd_process import Daemon, run_xvd

NOBODY = 65534


@pytest.mark.slow
def test_a_host_is_not_made_in_somebody_elses_directory(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives directories away")
    where = tmp_path / "theirs"
    where.mkdir()
    os.chown(where, NOBODY, NOBODY)

    result = run_xvd("host", str(where))

    assert (result.returncode, result.stdout) == (2, "")
    assert f"{where} belongs to user {NOBODY}: choose another, or be that user" in result.stderr
    assert os.listdir(where) == []


@pytest.mark.slow
def test_a_host_is_not_made_where_everybody_may_write(tmp_path: Path) -> None:
    where = tmp_path / "open"
    where.mkdir()
    where.chmod(0o1777)

    result = run_xvd("host", str(where))

    assert (result.returncode, result.stdout) == (2, "")
    assert f"others may write in {where}" in result.stderr
    assert os.listdir(where) == []


@pytest.mark.slow
def test_a_daemon_keeps_nothing_in_somebody_elses_host(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives directories away")
    where = tmp_path / "theirs"
    with Daemon("host", str(where)):
        os.chown(where, NOBODY, NOBODY)

        result = run_xvd("backend", "--host", str(where))

    assert (result.returncode, result.stdout) == (2, "")
    assert f"{where} belongs to user {NOBODY}" in result.stderr
    assert not (where / "state").exists()
