# SPDX-License-Identifier: Apache-2.0
"""An export whose storage is at hand makes holes and tells of them; and one that loses discards."""

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nbd_client import NbdClient, Reply
from served_disk import Served, served_disk

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, REQ_ONE, FAST_ZERO = 1, 2, 8, 16
EINVAL, ENOSPC, ENOTSUP = 22, 28, 95
MIB = 1 << 20
DATA, HOLE = 0, 3


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Data, and from 2 MiB to 3 MiB a hole."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.write(b"d" * 2 * MIB)
        file.truncate(3 * MIB)
        file.seek(3 * MIB)
        file.write(b"e" * MIB)
    os.sync()
    return path


@pytest.fixture
def served(image: Path, tmp_path: Path) -> Iterator[Served]:
    with served_disk(str(image), tmp_path, at_hand=True) as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[NbdClient]:
    with NbdClient(served.socket) as client:
        yield client.go(structured=True, contexts=True)


@pytest.fixture
def plain(served: Served) -> Iterator[NbdClient]:
    with NbdClient(served.socket) as client:
        yield client.go()


def status(client: NbdClient, offset: int, length: int, flags: int = 0) -> list[tuple[int, int]]:
    client.request(STATUS, offset, length, flags=flags)
    reply = client.reply()
    assert (reply.error, reply.kind) == (0, 5)
    assert reply.data[:4] == struct.pack(">I", 1)
    return [(a, b) for a, b in struct.iter_unpack(">II", reply.data[4:])]


def blocks(image: Path) -> int:
    os.sync()
    return image.stat().st_blocks * 512


def test_holes_are_told_of(client: NbdClient) -> None:
    assert status(client, 0, 4 * MIB) == [(2 * MIB, DATA), (MIB, HOLE), (MIB, DATA)]


@pytest.mark.parametrize(
    ("offset", "length", "flags", "wanted"),
    [
        (0, 4 * MIB, REQ_ONE, [(2 * MIB, DATA)]),
        (2 * MIB - 1, 2, 0, [(1, DATA), (1, HOLE)]),
        (2 * MIB + 1, 1, 0, [(1, HOLE)]),
        (3 * MIB - 100, 4096, 0, [(100, HOLE), (3996, DATA)]),
        (4 * MIB - 1, 1, 0, [(1, DATA)]),
    ],
)
def test_any_range_is_told_of_and_nothing_beyond(
    client: NbdClient, offset: int, length: int, flags: int, wanted: list[tuple[int, int]]
) -> None:
    assert status(client, offset, length, flags) == wanted


@pytest.mark.parametrize(("offset", "length"), [(0, 0), (4 * MIB, 1), (4 * MIB - 1, 2)])
def test_a_range_that_is_none_is_an_error(client: NbdClient, offset: int, length: int) -> None:
    client.request(STATUS, offset, length)
    assert client.reply().error == EINVAL


def test_what_was_written_is_no_hole_from_then_on(client: NbdClient) -> None:
    for offset in range(2 * MIB, 3 * MIB, 128 * 1024):
        client.request(WRITE, offset, 4096, payload=b"w" * 4096)
        assert client.reply().error == 0
        assert status(client, offset, 4096) == [(4096, DATA)]


def test_what_was_cut_off_is_no_hole(image: Path, client: NbdClient) -> None:
    os.truncate(image, 2 * MIB)
    assert status(client, 0, 4 * MIB) == [(2 * MIB, DATA), (2 * MIB, DATA)]


@pytest.mark.parametrize("flags", [0, FUA, FAST_ZERO])
def test_zeroes_are_a_hole(image: Path, plain: NbdClient, flags: int) -> None:
    before = blocks(image)

    assert plain.ask(ZEROES, 0, MIB, flags=flags) == 0

    assert plain.read(0, MIB + 1) == bytes(MIB) + b"d"
    assert blocks(image) == before - MIB


def test_zeroes_that_are_to_be_no_hole_take_space(image: Path, plain: NbdClient) -> None:
    before = blocks(image)

    assert plain.ask(ZEROES, 2 * MIB - 4096, MIB, flags=NO_HOLE) == 0

    assert plain.read(2 * MIB - 4097, 4098) == b"d" + bytes(4097)
    assert blocks(image) == before + MIB - 4096


@pytest.mark.parametrize(("offset", "length"), [(1, 1), (100, 8192), (511, 514), (0, 513)])
def test_zeroes_of_parts_of_blocks(plain: NbdClient, offset: int, length: int) -> None:
    assert plain.ask(ZEROES, offset, length) == 0

    wanted = b"d" * offset + bytes(length) + b"d" * 8192
    assert plain.read(0, len(wanted)) == wanted


def test_zeroes_and_writes_beside_each_other_lose_nothing(plain: NbdClient) -> None:
    """Each write reads and changes the block whose rest is zeroed by another request."""
    for number in range(200):
        at = number * 4096
        plain.request(ZEROES, at, 2048, cookie=2 * number)
        plain.request(WRITE, at + 2000, 100, cookie=2 * number + 1, payload=b"w" * 100)
    assert {plain.reply().error for _ in range(400)} == {0}

    for number in range(200):
        data = plain.read(number * 4096, 4096)
        assert (data[:2000], data[2100:]) == (bytes(2000), b"d" * 1996)
        assert data[2048:2100] == b"w" * 52


def test_zeroes_past_the_end_are_refused(plain: NbdClient) -> None:
    assert plain.ask(ZEROES, 4 * MIB - 4095, 4096) == ENOSPC


def test_through_a_layer_zeroes_are_written_and_nothing_is_told(
    image: Path, tmp_path: Path
) -> None:
    with served_disk(str(image), tmp_path, at_hand=True, layers=["stats"]) as served:
        with NbdClient(served.socket) as client:
            client.go(structured=True, contexts=True)
            client.request(STATUS, 0, 4096)
            assert client.reply().error == EINVAL
            before = blocks(image)
            client.request(ZEROES, 0, 4096)
            assert client.reply().error == 0
            client.request(ZEROES, 0, 4096, flags=FAST_ZERO)
            assert client.reply().error == ENOTSUP
    assert blocks(image) == before
    assert image.read_bytes()[:4097] == bytes(4096) + b"d"


def test_a_second_trim_is_answered_as_the_first(
    tmp_path: Path, expect_log: Callable[[str], None]
) -> None:
    """The first one finds out that the storage cannot: it was offered all the same."""
    expect_log("the backend has withdrawn discard")
    layer = "error:one_in=1,on=discard,errno=EOPNOTSUPP"
    with served_disk("memory:1M", tmp_path, layers=[layer]) as served:
        with NbdClient(served.socket) as client:
            client.go()
            replies = []
            for _ in range(3):
                client.request(TRIM, 0, 4096)
                replies.append(client.reply())
    assert replies == [Reply(7, ENOTSUP)] * 3
