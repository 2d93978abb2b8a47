# SPDX-License-Identifier: Apache-2.0
"""Clients that lie, stall, flood and vanish: an error or a closed connection, and nobody else
notices. That nothing is left behind, the fixture checks."""

import os
import random
import struct
from collections.abc import Iterator

import pytest
from nbd_client import NbdClient, Reply
from served_disk import SMALL as SIZE
from served_disk import Served

from xvd.export.nbd import CONNECTIONS_MAX
from xvd.export.nbd_connection import BYTES_MAX, REQUESTS_MAX
from xvd.export.nbd_negotiation import OPTION_LENGTH_MAX, OPTIONS_MAX

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
EINVAL = 22


async def counters(served: Served) -> dict[str, int]:
    return served.server.counters()


@pytest.fixture
def bystander(served: Served) -> Iterator[NbdClient]:
    """Somebody who behaves: what they wrote is there at the end and they are still served."""
    with NbdClient(served.socket) as client:
        client.go()
        data = os.urandom(4096)
        client.write(SIZE - 4096, data)
        yield client
        assert client.read(SIZE - 4096, 4096) == data


@pytest.fixture
def client(served: Served, bystander: NbdClient) -> Iterator[NbdClient]:
    with NbdClient(served.socket) as client:
        yield client


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\xff" * 1000,
        struct.pack(">I", 3) + b"IHAVEOPX" + bytes(8),
        struct.pack(">I", 3) + b"\0" * 16,
    ],
)
def test_nonsense_instead_of_negotiation(client: NbdClient, words: bytes) -> None:
    client.send(words)
    assert client.until_end()[18:] == b""


def test_an_oversized_option_is_refused_before_it_is_sent(client: NbdClient) -> None:
    client.greet()
    client.send(b"IHAVEOPT" + struct.pack(">II", 7, OPTION_LENGTH_MAX + 1))
    assert client.receive(20)[12:16] == struct.pack(">I", 1 << 31 | 9)
    client.until_end()


def test_negotiating_without_end(client: NbdClient) -> None:
    client.greet()
    for _ in range(OPTIONS_MAX + 1):
        client.send_option(3)
    assert len(client.until_end()) < OPTIONS_MAX * 100


@pytest.mark.parametrize("length", [1, 17, 19, 25])
def test_vanishing_in_the_middle_of_negotiation(client: NbdClient, length: int) -> None:
    whole = struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 7, 6) + bytes(6)
    client.send(whole[:length])
    client.socket.close()


def test_requests_right_behind_the_negotiation_are_served(client: NbdClient) -> None:
    option = b"IHAVEOPT" + struct.pack(">II", 7, 6) + bytes(6)
    request = struct.pack(">IHHQQI", 0x25609513, 0, READ, 7, 0, 512)
    client.send(struct.pack(">I", 3) + option + request)
    client.socket.shutdown(1)
    assert client.until_end().endswith(struct.pack(">IIQ", 0x67446698, 0, 7) + bytes(512))


def test_a_byte_at_a_time(client: NbdClient) -> None:
    request = struct.pack(">IHHQQI", 0x25609513, 0, WRITE, 7, 0, 600) + bytes(600)
    client.go()
    for byte in request:
        client.send(bytes([byte]))
    assert client.reply() == Reply(7, 0)


@pytest.mark.parametrize("magic", [0, 0x25609514, 0x67446698])
def test_a_request_with_another_magic_ends_the_connection(client: NbdClient, magic: int) -> None:
    client.go()
    client.send(struct.pack(">IHHQQI", magic, 0, READ, 7, 0, 512))
    assert client.until_end() == b""


def test_an_absurd_write_ends_the_connection(client: NbdClient) -> None:
    client.go()
    client.request(WRITE, 0, 0xFFFFFFFF)
    assert client.until_end() == b""


@pytest.mark.parametrize("length", [1, 4095, 65536, SIZE - 1])
def test_vanishing_in_the_middle_of_a_payload_writes_nothing(
    served: Served, client: NbdClient, bystander: NbdClient, length: int
) -> None:
    client.go()
    client.request(WRITE, 0, SIZE - 4096, payload=b"\xff" * min(length, SIZE - 4097))
    client.socket.close()
    assert bystander.read(0, 4096) == bytes(4096)


def test_vanishing_with_many_requests_on_the_disk(
    served: Served, client: NbdClient, bystander: NbdClient
) -> None:
    client.go()
    for cookie in range(200):
        client.request(WRITE, cookie * 4096, 4096, cookie=cookie, payload=b"\x11" * 4096)
    client.socket.close()
    assert bystander.ask(FLUSH) == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", [READ, TRIM, ZEROES, STATUS, 77])
def test_a_flood_of_impossible_requests_without_reading_is_bounded(
    served: Served, client: NbdClient, bystander: NbdClient, command: int
) -> None:
    client.go()
    client.socket.setblocking(False)
    flood = struct.pack(">IHHQQI", 0x25609513, 0, command, 7, SIZE, 4096) * 1000
    refusals = 0
    while refusals < 1000:  # a million requests at the least, unless they are not taken
        try:
            client.socket.send(flood)
        except BlockingIOError:
            refusals += 1
            assert bystander.ask(FLUSH) == 0
    assert served.call(counters(served))["held_bytes"] < 8 << 20


@pytest.mark.slow
def test_a_client_that_does_not_read_is_not_read_from(
    served: Served, client: NbdClient, bystander: NbdClient
) -> None:
    number, length = 2 * REQUESTS_MAX, 512 << 10
    client.go()
    request = struct.Struct(">IHHQQI").pack
    client.send(b"".join(request(0x25609513, 0, READ, n, 0, length) for n in range(number)))
    assert bystander.read(0, 512) == bytes(512)
    figures = served.call(counters(served))
    assert figures["held_bytes"] <= BYTES_MAX + (8 << 20)
    assert figures["in_flight"] <= REQUESTS_MAX
    cookies = set()
    for _ in range(number):
        cookies.add(client.reply().cookie)
        client.receive(length)
    assert len(cookies) == number


def test_payloads_announced_and_withheld_do_not_hold_up_others(
    served: Served, bystander: NbdClient
) -> None:
    clients = [NbdClient(served.socket).go() for _ in range(8)]
    for client in clients:
        client.request(WRITE, 0, SIZE)
    assert bystander.write(0, b"x" * 4096) == 0
    for client in clients:
        client.socket.close()


@pytest.mark.slow
def test_the_zeroing_of_a_client_that_left_is_given_up(
    served: Served, client: NbdClient, bystander: NbdClient
) -> None:
    client.go()
    for _ in range(200):
        client.request(ZEROES, 0, SIZE - 4096)
    client.socket.close()
    while served.call(counters(served))["connected"] > 1:
        assert bystander.ask(FLUSH) == 0
    assert served.disk.counters().wr_sect < 100 * SIZE // 512


def test_one_client_too_many_is_turned_away(served: Served) -> None:
    clients = [NbdClient(served.socket) for _ in range(CONNECTIONS_MAX + 1)]  # none is idle yet
    assert clients[CONNECTIONS_MAX].until_end() == b""
    for client in clients:
        client.socket.close()


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_after_the_negotiation(client: NbdClient, seed: int) -> None:
    rng = random.Random(seed)
    client.go(structured=bool(seed % 2))
    stream = b""
    for _ in range(50):
        magic = 0x25609513 if rng.random() < 0.98 else rng.getrandbits(32)
        command, flags = rng.choice((READ, TRIM, CACHE, ZEROES, STATUS, 9)), rng.getrandbits(5)
        offset, length = rng.randrange(SIZE - 8192), rng.randrange(4096)
        stream += struct.pack(">IHHQQI", magic, flags, command, 7, offset, length)
    client.send(stream)
    client.socket.shutdown(1)
    client.until_end()
