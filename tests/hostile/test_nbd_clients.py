# SPDX-License-Identifier: Apache-2.0
"""NBD clients that lie, stall and vanish, as the compiled transmission meets them: it ends, or it
stops reading, and holds no more than it may. The rig checks that every one of them leaves."""

import contextlib
import random
import struct

import pytest
from rig_client import (
    DISC,
    READ,
    TRIM,
    WRITE,
    Client,
    client_world,
    new_client,
    settle,
    waiting_client,
)

from xvd.dataplane.front.clients import Clients
from xvd.dataplane.front.range_lock import RangeLock
from xvd.dataplane.front.waiting_room import WaitingRoom
from xvd.export import nbd_protocol as nbd
from xvd.export.transmission import Transmission

HEADER = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, WRITE, 7, 0, 4096)


def over(room: Clients, client: Client) -> int:
    settle(room)
    client.listen()
    return client.news


@pytest.mark.parametrize("magic", [0, nbd.REQUEST_MAGIC + 1, nbd.SIMPLE_REPLY_MAGIC, 0xFFFFFFFF])
def test_another_magic_ends_the_connection(magic: int) -> None:
    with waiting_client() as (room, client):
        client.socket.send(struct.pack(">I", magic) + HEADER[4:])
        assert over(room, client) & Transmission.MALFORMED
        assert client.socket.recv(1) == b""


@pytest.mark.parametrize("length", [(1 << 20) + 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_an_absurd_payload_ends_the_connection(length: int) -> None:
    with waiting_client() as (room, client):
        client.send(WRITE, 0, length)
        assert over(room, client) & Transmission.MALFORMED
        assert client.transmission.held == 0


@pytest.mark.parametrize("length", [0, 1, 27, 28, 29, 28 + 4095])
def test_vanishing_in_the_middle_of_a_request_asks_nothing(length: int) -> None:
    with waiting_client() as (room, client):
        client.socket.send((HEADER + bytes(4096))[:length])
        settle(room)
        client.socket.close()
        assert over(room, client) & Transmission.EOF
        assert client.asked == []
        assert client.left


@pytest.mark.parametrize("length", [28, 600, 70_000])
def test_vanishing_with_everything_on_the_ring(length: int) -> None:
    with client_world() as (world, client):
        client.send(WRITE, 0, 4096, payload=bytes(4096))
        client.send(READ, 8192, 64 << 10)
        requests = world.on_ring()
        client.socket.close()
        settle(world.clients)
        assert not client.left
        world.reply(*requests)
        assert world.clients.wishes()
        world.clients.step()
        assert client.left


def test_a_byte_at_a_time() -> None:
    with waiting_client() as (room, client):
        for byte in HEADER + b"p" * 4096:
            client.socket.send(bytes([byte]))
            settle(room)
        [asked] = client.listen()
        assert asked.payload == b"p" * 4096


def test_payloads_announced_and_withheld_are_bounded() -> None:
    with waiting_client() as (room, client):
        client.send(WRITE, 0, 1 << 20)
        client.send(WRITE, 0, 1 << 20)  # taken for the first one's payload
        settle(room)
        assert client.transmission.held == 1 << 20
        assert client.transmission.in_progress == 1


@pytest.mark.parametrize(("length", "taken"), [(4096, 16), (256 << 10, 4), (1 << 20, 1)])
def test_no_more_is_taken_than_there_is_room_for(length: int, taken: int) -> None:
    with waiting_client() as (room, client):
        for n in range(32):
            client.send(READ, 1, length, cookie=n)
        settle(room)
        assert len(client.listen()) == taken
        assert client.transmission.in_progress == taken
        assert client.transmission.held == taken * length
        assert room.wishes()[0][1] == 0
        for n in range(32 - taken):
            client.transmission.answer(client.asked[n].slot, nbd.simple_reply(n))
            settle(room)
            client.listen()
        assert len(client.asked) == 32


def test_large_and_small_requests_share_one_budget() -> None:
    rng = random.Random(4)
    with waiting_client() as (room, client):
        lengths = rng.choices((512, 5000, 70_000, 500_000, 1 << 20), k=400)
        pack = nbd.REQUEST.pack
        client.socket.send(
            b"".join(pack(nbd.REQUEST_MAGIC, 0, READ, 7, 1, length) for length in lengths)
        )
        settle(room)
        answered = 0
        while answered < 400:
            client.listen()
            assert client.transmission.held <= 1 << 20
            assert client.transmission.in_progress <= 16
            client.transmission.answer(client.asked[answered].slot, nbd.simple_reply(answered))
            answered += 1
            settle(room)
            client.received()


def test_replies_that_are_not_read_hold_up_nobody_but_their_client() -> None:
    with client_world() as (world, client):
        other = new_client()
        world.clients.join(other.transmission)
        for n in range(64):
            client.send(READ, 0, 256 << 10, cookie=n)
        world.serve(b"r")
        assert client.transmission.held <= 1 << 20
        assert client.transmission.in_progress == 0
        other.send(READ, 0, 512)
        world.serve(b"r")
        settle(world.clients)
        assert other.received() == nbd.simple_reply(7) + b"r" * 512
        received = 0
        while received < 64 * (16 + (256 << 10)):
            received += len(client.received())
            world.serve(b"r")
            settle(world.clients)
        other.socket.close()
        settle(world.clients)
        assert other.left


def test_nothing_is_taken_after_a_disconnection() -> None:
    with waiting_client() as (room, client):
        client.send(TRIM, 0, 4096)
        client.send(DISC)
        client.send(TRIM, 4096, 4096)
        settle(room)
        [asked] = client.listen()
        client.transmission.answer(asked.slot, b"last")
        settle(room)
        assert client.received() == b"last"
        assert client.left
        assert client.news & (Transmission.EOF | Transmission.MALFORMED) == 0


def test_finishing_answers_what_was_taken() -> None:
    with client_world() as (world, client):
        client.send(READ, 0, 512)
        requests = world.on_ring()
        client.transmission.finish()
        client.send(READ, 0, 512)
        world.reply(*requests)
        settle(world.clients)
        assert len(client.received()) == 16 + 512
        assert client.left


def test_cutting_ends_at_once_what_is_not_on_the_ring() -> None:
    with waiting_client() as (room, client):
        client.send(TRIM, 0, 4096)
        client.socket.send(HEADER)
        settle(room)
        [asked] = client.listen()
        client.transmission.cut()
        settle(room)
        assert client.socket.recv(1) == b""
        assert not client.left
        client.transmission.answer(asked.slot, b"unheard")
        settle(room)
        assert client.left


@pytest.mark.parametrize("seed", range(30))
def test_random_bytes(seed: int) -> None:
    rng = random.Random(seed)
    with client_world() as (world, client):
        stream = b""
        for _ in range(60):
            magic = nbd.REQUEST_MAGIC if rng.random() < 0.97 else rng.getrandbits(32)
            command = rng.choice((READ, READ, WRITE, WRITE, TRIM, 3, 9))
            at, length = rng.randrange(2100) * 512, rng.choice((0, 512, 4096, 100, 70_000))
            flags = rng.choice((0, 0, 0, rng.getrandbits(16)))
            stream += nbd.REQUEST.pack(magic, flags, command, 7, at, length)
            stream += rng.randbytes(length) if command == WRITE else b""
        at = 0
        while at < len(stream) and not client.news & Transmission.OVER:
            with contextlib.suppress(BlockingIOError, ConnectionError):
                at += client.socket.send(stream[at : at + rng.choice((1, 28, 5000, 200_000))])
            world.serve(b"x")
            for asked in client.listen():
                client.transmission.answer(asked.slot, nbd.simple_reply(7, 22))
            client.received()


def test_one_that_never_joins_gives_everything_back() -> None:
    client = new_client()
    room = WaitingRoom(RangeLock())
    room.join(client.transmission)
    assert room.take_back() == [client.transmission]
    client.socket.close()
