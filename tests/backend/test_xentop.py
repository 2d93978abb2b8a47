# SPDX-License-Identifier: Apache-2.0
"""Figures for xentop, in a directory where every local user may write."""

import os
from pathlib import Path

import pytest

from xvd.backend.counters import BackCounters
from xvd.backend.xentop import PAGE, XentopPage, page_path, remove_page
from xvd.errors import ConfigError

NOBODY = 65534


def as_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")


def test_a_page_shows_what_is_counted_and_goes_with_its_disk(tmp_path: Path) -> None:
    page = XentopPage(1, 51712, directory=tmp_path)
    page.update(BackCounters(rd_req=3, rd_sect=24, storage_errors=1))

    shown = PAGE.unpack(page.path.read_bytes())
    page.close()

    assert (shown[3], shown[4], shown[5], shown[11]) == (3, 3, 24, 1)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mode", [0o755, 0o777])
def test_a_directory_that_somebody_made_before_us_gets_no_page(tmp_path: Path, mode: int) -> None:
    as_root()
    precious = tmp_path / "precious"
    precious.write_bytes(b"root's file")
    path = page_path(tmp_path, os.getpid(), 1, 51712)
    path.parent.mkdir()
    path.symlink_to(precious)
    path.parent.chmod(mode)
    os.chown(path.parent, NOBODY, NOBODY)

    with pytest.raises(ConfigError, match=f"belongs to user {NOBODY}"):
        XentopPage(1, 51712, directory=tmp_path)

    assert precious.read_bytes() == b"root's file"


def test_a_link_in_our_own_directory_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"root's file")
    path = page_path(tmp_path, os.getpid(), 1, 51712)
    path.parent.mkdir(mode=0o755)
    path.symlink_to(precious)

    XentopPage(1, 51712, directory=tmp_path).close()

    assert precious.read_bytes() == b"root's file"


def test_what_a_predecessor_left_is_removed_only_from_a_directory_of_ours(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "vbd-1-51712").touch()
    path = page_path(tmp_path, 4321, 1, 51712)
    path.parent.symlink_to(elsewhere)

    remove_page(path)

    assert (elsewhere / "vbd-1-51712").exists()
