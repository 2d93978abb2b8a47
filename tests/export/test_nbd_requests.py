# SPDX-License-Identifier: Apache-2.0
"""Every command over a real ring, in both kinds of reply, as a tiny client sees it."""

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nbd_client import NbdClient, Reply
from served_disk import SMALL as SIZE
from served_disk import Served, served_disk

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16
EPERM, EIO, EINVAL, ENOSPC, EOVERFLOW, EOPNOTSUPP = 1, 5, 22, 28, 75, 95


@pytest.fixture
def client(served: Served) -> Iterator[NbdClient]:
    with NbdClient(served.socket) as client:
        yield client.go("disk")


@pytest.fixture
def structured(served: Served) -> Iterator[NbdClient]:
    with NbdClient(served.socket) as client:
        yield client.go("disk", structured=True, contexts=True)


def test_flags_are_what_the_disk_can(client: NbdClient) -> None:
    has, flush, fua, trim, zeroes, df, multi, fast = 1, 4, 8, 32, 64, 128, 256, 2048
    assert client.flags == has | flush | fua | trim | zeroes | df | multi | fast


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 4096), (511, 2), (1, 1), (SIZE - 1, 1), (12345, 300_000)]
)
def test_what_is_written_is_read_at_any_alignment(
    client: NbdClient, offset: int, length: int
) -> None:
    data = os.urandom(length)
    assert client.write(offset, data) == 0
    assert client.read(offset, length) == data


@pytest.mark.slow
def test_the_longest_request_is_32_mib(tmp_path: Path) -> None:
    with served_disk("memory:40M", tmp_path) as served, NbdClient(served.socket) as client:
        data = os.urandom(1 << 20) * 32
        client.go()
        assert client.write(4096, data) == 0
        assert client.read(4096, 32 << 20) == data


@pytest.mark.parametrize("flags", [0, FUA])
@pytest.mark.parametrize("command", [FLUSH, TRIM, CACHE, ZEROES])
def test_commands_without_data_succeed(client: NbdClient, command: int, flags: int) -> None:
    assert client.ask(command, 0, 0 if command == FLUSH else 4096, flags=flags) == 0


def test_fua_flushes_after_the_write(served: Served, client: NbdClient) -> None:
    before = served.disk.counters().requests
    client.write(0, bytes(4096), flags=FUA)
    assert served.disk.counters().requests - before == 2


@pytest.mark.parametrize(("offset", "length"), [(0, 3 << 20), (100, 1 << 20), (513, 7)])
def test_zeroes_are_written_exactly_there(client: NbdClient, offset: int, length: int) -> None:
    client.write(0, b"\xff" * (4 << 20))
    assert client.ask(ZEROES, offset, length, flags=NO_HOLE) == 0
    assert client.read(0, 4 << 20) == (
        b"\xff" * offset + bytes(length) + b"\xff" * ((4 << 20) - offset - length)
    )


def test_fast_zero_says_at_once_that_it_is_not_fast(client: NbdClient) -> None:
    assert client.ask(ZEROES, 0, SIZE, flags=FAST_ZERO) == EOPNOTSUPP


@pytest.mark.parametrize(
    ("command", "error"),
    [(READ, EINVAL), (WRITE, ENOSPC), (TRIM, EINVAL), (ZEROES, ENOSPC), (CACHE, EINVAL)],
)
@pytest.mark.parametrize("offset", [SIZE - 4095, SIZE, 1 << 63, (1 << 64) - 1])
def test_past_the_end_is_an_error_and_the_stream_goes_on(
    client: NbdClient, command: int, error: int, offset: int
) -> None:
    client.request(command, offset, 4096, payload=bytes(4096) if command == WRITE else b"")
    assert client.reply() == Reply(7, error)
    assert client.read(0, 512) == bytes(512)


@pytest.mark.parametrize("command", [8, 255, 0xFFFF])
def test_unknown_commands_are_invalid(client: NbdClient, command: int) -> None:
    assert client.ask(command) == EINVAL
    assert client.read(0, 512) == bytes(512)


@pytest.mark.parametrize(
    ("command", "flags"),
    [(READ, FAST_ZERO), (WRITE, 0x8000), (TRIM, NO_HOLE), (FLUSH, DF), (ZEROES, REQ_ONE)],
)
def test_flags_that_a_command_does_not_have_are_invalid(
    client: NbdClient, command: int, flags: int
) -> None:
    client.request(command, 0, 512, flags=flags, payload=bytes(512) if command == WRITE else b"")
    assert client.reply() == Reply(7, EINVAL)


def test_a_read_that_is_too_long_is_refused(client: NbdClient) -> None:
    assert client.ask(READ, 0, (32 << 20) + 1) == EOVERFLOW


def test_empty_requests_succeed(client: NbdClient) -> None:
    assert client.read(0, 0) == b""
    assert client.write(SIZE, b"") == 0


def test_structured_read(structured: NbdClient) -> None:
    structured.request(READ, 4096, 512, cookie=99, flags=DF)
    assert structured.reply() == Reply(99, 0, 1, struct.pack(">Q", 4096) + bytes(512))


def test_structured_read_of_nothing(structured: NbdClient) -> None:
    structured.request(READ, 0, 0)
    assert structured.reply() == Reply(7, 0, 0, b"")


def test_structured_errors_have_words(structured: NbdClient) -> None:
    structured.request(READ, SIZE, 512)
    reply = structured.reply()
    words = b"beyond the end of a disk of 16777216 bytes"
    assert reply == Reply(7, EINVAL, 32769, struct.pack(">IH", EINVAL, len(words)) + words)


def test_without_the_storage_at_hand_there_is_no_block_status(structured: NbdClient) -> None:
    structured.request(STATUS, 512, 1 << 20, flags=REQ_ONE)
    assert structured.reply().error == EINVAL


def test_block_status_without_a_context_is_invalid(client: NbdClient) -> None:
    assert client.ask(STATUS, 0, 512) == EINVAL


def test_many_requests_are_in_progress_at_once_and_each_gets_its_answer(client: NbdClient) -> None:
    for cookie in range(1000):
        client.request(WRITE, cookie * 512, 512, cookie=cookie, payload=bytes([cookie % 251]) * 512)
    assert sorted(client.reply() for _ in range(1000)) == [Reply(n, 0) for n in range(1000)]
    expected = b"".join(bytes([n % 251]) * 512 for n in range(1000))
    assert client.read(0, 512_000) == expected


def test_another_client_reads_what_was_written(served: Served, client: NbdClient) -> None:
    client.write(1000, b"seen by all")
    with NbdClient(served.socket) as other:
        assert other.go().read(1000, 11) == b"seen by all"


def test_disconnecting_answers_what_was_asked_before(client: NbdClient) -> None:
    for cookie in range(50):
        client.request(WRITE, cookie * 512, 512, cookie=cookie, payload=bytes(512))
    client.request(DISC)
    assert len(client.until_end()) == 50 * 16


def test_half_closing_answers_what_was_asked_before(client: NbdClient) -> None:
    client.request(WRITE, 0, 512, payload=bytes(512))
    client.socket.shutdown(1)
    assert len(client.until_end()) == 16


@pytest.mark.parametrize("command", [WRITE, TRIM, ZEROES])
def test_a_read_only_disk_says_so_and_refuses(tmp_path: Path, command: int) -> None:
    with served_disk("memory:1M", tmp_path, options="access=ro,") as served:
        with NbdClient(served.socket) as client:
            client.go().request(command, 0, 512, payload=bytes(512) if command == WRITE else b"")
            assert client.reply() == Reply(7, EPERM)
            assert client.flags & (2 | 32 | 64) == 2


def test_a_disk_without_discard_does_not_offer_trim(tmp_path: Path) -> None:
    with served_disk("memory:1M", tmp_path, options="no-discard,") as served:
        with NbdClient(served.socket) as client:
            assert client.go().ask(TRIM, 0, 4096) == EINVAL
            assert not client.flags & 32


@pytest.mark.parametrize("command", [READ, WRITE, FLUSH])
def test_errors_of_the_storage_reach_the_client(
    tmp_path: Path, command: int, expect_log: Callable[[str], None]
) -> None:
    expect_log("storage fails")
    with served_disk("memory:1M", tmp_path, layers=["error:one_in=1"]) as served:
        with NbdClient(served.socket) as client:
            client.go().request(command, 0, 512, payload=bytes(512) if command == WRITE else b"")
            assert client.reply() == Reply(7, EIO)
            assert served.server.counters()["failed"] == 1
