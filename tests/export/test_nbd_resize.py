# SPDX-License-Identifier: Apache-2.0
"""A disk that is resized while it is exported: NBD tells a client the size once."""

from pathlib import Path

import pytest
from nbd_client import NbdClient
from rig_disk import until
from served_disk import Served, served_disk

MIB = 1 << 20
ENOSPC, EINVAL = 28, 22


async def resize(served: Served, size: int) -> None:
    """The storage changes, and the disk has heard of it."""
    assert served.rig._server is not None
    await served.rig._server.device("1/51712").disk.resize(size)
    await until(lambda: served.disk.size == size)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4 * MIB))
    return path


def test_who_comes_later_sees_the_new_size(image: Path, tmp_path: Path) -> None:
    with served_disk(str(image), tmp_path) as served:
        with NbdClient(served.socket) as before:
            assert before.go().size == 4 * MIB
        served.call(resize(served, 8 * MIB))
        with NbdClient(served.socket) as after:
            assert after.go().size == 8 * MIB
            assert after.write(8 * MIB - 512, b"e" * 512) == 0
            assert after.read(8 * MIB - 512, 512) == b"e" * 512


def test_who_is_there_already_may_go_beyond_the_end_it_was_told(
    image: Path, tmp_path: Path
) -> None:
    with served_disk(str(image), tmp_path) as served, NbdClient(served.socket) as client:
        client.go()
        assert client.write(4 * MIB, bytes(512)) == ENOSPC
        served.call(resize(served, 8 * MIB))
        assert client.write(4 * MIB, b"n" * 512) == 0
        assert client.read(4 * MIB, 512) == b"n" * 512


def test_what_is_gone_from_a_smaller_disk_is_refused_and_the_rest_is_there(
    image: Path, tmp_path: Path
) -> None:
    with served_disk(str(image), tmp_path) as served, NbdClient(served.socket) as client:
        client.go()
        client.write(0, b"a" * 512)
        served.call(resize(served, 2 * MIB))
        assert client.write(2 * MIB, bytes(512)) == ENOSPC
        assert client.ask(0, 2 * MIB, 512) == EINVAL
        assert client.read(0, 512) == b"a" * 512
