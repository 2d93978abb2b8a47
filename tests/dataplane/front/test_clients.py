# SPDX-License-Identifier: Apache-2.0
"""Clients in the thread of a queue: what goes on its ring, the long way, and to the next queue."""

import errno
import gc
import threading

import pytest
from rig_client import (
    FLUSH,
    READ,
    TRIM,
    WRITE,
    ClientWorld,
    client_world,
    end,
    new_client,
    open_lock,
    settle,
    waiting_client,
)
from rig_front import operation_of
from rig_queue import QueueWorld

from xvd.blkif.abi import Op
from xvd.dataplane.front.clients import Clients
from xvd.dataplane.front.options import FrontOptions
from xvd.dataplane.front.queue import FrontQueue
from xvd.dataplane.front.range_lock import RangeLock
from xvd.dataplane.front.waiting_room import WaitingRoom
from xvd.dataplane.loop.loop import Loop
from xvd.errors import LocalProtocolError
from xvd.export import nbd_protocol as nbd
from xvd.export.transmission import Transmission

OK = nbd.simple_reply(7)


def test_a_read_goes_over_the_ring_and_back() -> None:
    with client_world() as (world, client):
        client.send(READ, 4096, 1024)
        [request] = world.serve(b"data")
        assert (operation_of(request), request.sector_number) == (Op.READ, 8)  # type: ignore[union-attr]
        assert client.received() == OK + b"data" * 256


def test_a_structured_read_says_where_its_data_lies() -> None:
    with client_world(structured=True) as (world, client):
        client.send(READ, 4096, 1024, flags=4)
        world.serve(b"data")
        settle(world.clients)
        assert client.received() == nbd.data_chunk_header(7, 4096, 1024) + b"data" * 256


def test_a_write_carries_its_data() -> None:
    with client_world() as (world, client):
        client.send(WRITE, 512, 1024, payload=b"ab" * 512)
        [request] = world.on_ring()
        assert world.data(request) == b"ab" * 512
        assert client.received() == b""
        world.reply(request)
        settle(world.clients)
        assert client.received() == OK


def test_a_flush_goes_over_the_ring() -> None:
    with client_world() as (world, client):
        client.send(FLUSH)
        [request] = world.serve()
        settle(world.clients)
        assert operation_of(request) == Op.FLUSH_DISKCACHE
        assert client.received() == OK


def test_replies_come_in_the_order_of_the_answers() -> None:
    with client_world() as (world, client):
        client.send(READ, 0, 512, cookie=1)
        client.send(WRITE, 4096, 512, cookie=2, payload=bytes(512))
        read, write = world.on_ring()
        world.reply(write)
        world.reply(read)
        settle(world.clients)
        assert client.received() == nbd.simple_reply(2) + nbd.simple_reply(1) + bytes(512)


@pytest.mark.parametrize("length", [4096, 65536, 200_000 // 512 * 512])
def test_payloads_of_any_length_one_behind_the_other(length: int) -> None:
    with client_world() as (world, client):
        stream = b""
        for n in range(4):
            header = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, WRITE, n, n * length, length)
            stream += header + bytes([n + 1]) * length
        written = bytearray(4 * length)
        client.socket.setblocking(True)
        sender = threading.Thread(target=client.socket.sendall, args=(stream,))
        sender.start()
        replies = b""
        while len(replies) < 4 * 16:
            for request in world.requests():
                at = request.sector_number * 512  # type: ignore[union-attr]
                data = world.data(request)
                written[at : at + len(data)] = data
                world.reply(request)
            replies += client.received()
        sender.join()
        assert written == b"".join(bytes([n + 1]) * length for n in range(4))


@pytest.mark.parametrize(
    ("command", "offset", "length", "flags"),
    [
        (READ, 1, 512, 0), (READ, 0, 511, 0), (WRITE, 0, 100, 0), (WRITE, 0, 512, 1),
        (READ, 0, 0, 0), (TRIM, 0, 4096, 0), (READ, 2048 * 512, 512, 0),
        (READ, 2**64 - 512, 512, 0), (WRITE, 2047 * 512, 1024, 0), (READ, 0, 512, 8),
        (99, 0, 0, 0), (FLUSH, 0, 0, 2), (READ, 0, (1 << 20) + 512, 0),
    ],
)  # fmt: skip
def test_all_else_is_asked(command: int, offset: int, length: int, flags: int) -> None:
    with client_world() as (world, client):
        payload = bytes(length) if command == WRITE else b""
        client.send(command, offset, length, flags=flags, payload=payload)
        assert world.on_ring() == []
        [asked] = client.listen()
        assert (asked.error, asked.command, asked.offset, asked.length) == (
            0,
            command,
            offset,
            length,
        )
        assert asked.payload == (payload or None)
        assert client.transmission.answer(asked.slot, b"reply")
        settle(world.clients)
        assert client.received() == b"reply"


def test_what_the_backend_fails_is_told_with_its_error() -> None:
    with client_world() as (world, client):
        client.send(WRITE, 0, 512, payload=bytes(512))
        world.reply(*world.on_ring(), status=-1)
        [asked] = client.listen()
        assert (asked.error, asked.payload) == (errno.EIO, None)


def test_a_flush_that_the_backend_does_not_know_is_asked_as_if_it_were_new() -> None:
    with client_world() as (world, client):
        client.send(FLUSH)
        world.reply(*world.on_ring(), status=-2)
        [asked] = client.listen()
        assert (asked.error, asked.command) == (0, FLUSH)


def test_an_answer_waits_behind_a_reply_half_sent() -> None:
    with client_world() as (world, client):
        client.send(READ, 0, 512 << 10, cookie=1)
        client.send(TRIM, 0, 4096, cookie=2)
        world.serve(b"x")
        [asked] = client.listen()
        client.transmission.answer(asked.slot, b"head", b"body" * 100)
        replies = b""
        while len(replies) < 16 + (512 << 10) + 404:
            settle(world.clients)
            replies += client.received()
        assert replies == nbd.simple_reply(1) + b"x" * (512 << 10) + b"head" + b"body" * 100


def test_a_second_answer_is_refused() -> None:
    with client_world() as (world, client):
        client.send(TRIM)
        settle(world.clients)
        [asked] = client.listen()
        client.transmission.answer(asked.slot, b"one")
        with pytest.raises(ValueError, match="nothing was asked"):
            client.transmission.answer(asked.slot, b"another")


def test_an_answer_to_nothing_is_refused() -> None:
    with client_world() as (_, client):
        for slot in (0, 16, 1 << 31):
            with pytest.raises(ValueError, match="nothing was asked"):
                client.transmission.answer(slot, b"")


def test_what_came_too_early_is_not_lost() -> None:
    with ClientWorld() as world:
        clients = world.serve_clients()
        header = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, READ, 7, 0, 512)
        client = new_client(received=header)
        clients.join(client.transmission)
        world.serve(b"early!!!")
        settle(clients)
        assert client.received() == OK + b"early!!!" * 64
        end(clients, client)


# ---- The range lock ----


def test_a_write_on_sectors_that_are_held_goes_the_long_way() -> None:
    with client_world() as (world, client):
        token = world.lock.hold(8, 16)
        client.send(WRITE, 15 * 512, 512, payload=bytes(512))
        client.send(WRITE, 16 * 512, 512, payload=bytes(512))
        client.send(READ, 8 * 512, 512)
        requests = world.on_ring()
        assert len(requests) == 2
        assert [asked.offset for asked in client.listen()] == [15 * 512]
        world.reply(*requests)
        world.lock.release(token)


def test_holding_is_to_wait_for_the_writes_that_were_there_before() -> None:
    with client_world() as (world, client):
        client.send(WRITE, 8 * 512, 512, payload=bytes(512))
        [request] = world.on_ring()
        token, beside = world.lock.hold(8, 9), world.lock.hold(9, 10)
        assert [world.lock.busy(token), world.lock.busy(beside)] == [True, False]
        world.reply(request)
        assert not world.lock.busy(token)
        world.lock.release(token)
        world.lock.release(beside)
        assert world.lock.fd == -1


def test_a_range_lock_that_is_held_may_go() -> None:
    RangeLock().hold(0, 1)
    gc.collect()


def test_a_range_lock_allows_nothing_at_first() -> None:
    with ClientWorld() as world:
        clients = world.serve_clients(RangeLock())
        client = new_client()
        clients.join(client.transmission)
        client.send(READ, 0, 512)
        client.send(FLUSH)
        assert world.on_ring() == []
        assert len(client.listen()) == 2
        end(clients, client)


def test_blocks_have_at_least_a_sector() -> None:
    with pytest.raises(LocalProtocolError):
        RangeLock().allow(sectors=1, block_sectors=0, writable=True, flushes=True)


# ---- From one queue to the next ----


def moved(first: ClientWorld, second: ClientWorld, lock: RangeLock) -> None:
    """All clients of one world go to another, as when a disk's backend comes back."""
    clients = second.serve_clients(lock)
    for transmission in first.clients.take_back():
        clients.join(transmission)


def test_what_is_under_way_goes_to_the_next_queue_in_order() -> None:
    with ClientWorld() as first, ClientWorld() as second:
        clients = first.serve_clients()
        client = new_client()
        clients.join(client.transmission)
        for n in range(8):
            client.send(WRITE, n * 8192, 512, cookie=n, payload=bytes([n]) * 512)
        requests = first.on_ring()
        first.reply(requests[3], requests[5])
        moved(first, second, first.lock)
        again = second.on_ring()
        assert [second.data(request)[0] for request in again] == [0, 1, 2, 4, 6, 7]
        second.reply(*again)
        settle(second.clients)
        cookies = [3, 5, 0, 1, 2, 4, 6, 7]
        assert client.received() == b"".join(nbd.simple_reply(n) for n in cookies)
        end(second.clients, client)


def test_what_the_next_queue_does_not_take_goes_the_long_way() -> None:
    """Larger blocks, and no flush: as when another backend has come."""
    with ClientWorld() as first, ClientWorld(block_sectors=8) as second:
        clients = first.serve_clients()
        client = new_client()
        clients.join(client.transmission)
        client.send(WRITE, 512, 512, payload=b"w" * 512)
        client.send(FLUSH)
        client.send(WRITE, 4096, 4096, payload=bytes(4096))
        assert len(first.on_ring()) == 3
        first.lock.allow(sectors=2048, block_sectors=8, writable=True, flushes=False)
        token = first.lock.hold(1, 2)
        moved(first, second, first.lock)
        requests = second.on_ring()
        assert len(requests) == 1
        second.reply(*requests)
        asked = client.listen()
        assert [(one.command, one.payload) for one in asked] == [(WRITE, b"w" * 512), (FLUSH, None)]
        assert not first.lock.busy(token)
        first.lock.release(token)
        end(second.clients, client)


def test_a_queue_that_ends_forgets_what_its_clients_have_under_way() -> None:
    """Its memory is the client's, and used again."""
    with ClientWorld() as world:
        clients = world.serve_clients()
        client = new_client()
        clients.join(client.transmission)
        client.send(READ, 0, 4096)
        client.send(READ, 4096, 4096)
        assert len(world.on_ring()) == 1  # neighbours are one request
        room = WaitingRoom(world.lock)
        for transmission in clients.take_back():
            room.join(transmission)
        world.drop_queue()
        del world.front, world.clients, clients
        gc.collect()
        settle(room)
        assert client.listen() == []
        room.give_up()
        assert [asked.offset for asked in client.listen()] == [0, 4096]
        end(room, client)


def test_a_set_of_clients_may_go_with_everything_under_way() -> None:
    with ClientWorld() as world:
        clients = world.serve_clients()
        client = new_client()
        clients.join(client.transmission)
        client.send(WRITE, 0, 4096, payload=bytes(4096))
        world.on_ring()
        world.drop_queue()
        del world.front, world.clients, clients
        gc.collect()
        client.socket.close()


def test_where_there_is_no_queue_everything_is_asked() -> None:
    with waiting_client() as (room, client):
        client.send(READ, 0, 512)
        client.send(WRITE, 0, 512, payload=b"p" * 512)
        settle(room)
        assert [asked.payload for asked in client.listen()] == [None, b"p" * 512]


# ---- In a thread ----


def test_a_socket_wakes_the_thread_of_the_queue() -> None:
    with QueueWorld() as world, world.running():
        pages = world.guest.grants.share(world.backend.domid, 32 * 11)
        front = FrontQueue(world.ring_pages.view, 32, 0, pages, world.port, FrontOptions())
        thread = threading.Thread(target=(loop := Loop(front)).run)
        thread.start()
        clients = Clients(open_lock(), front)
        loop.replace(clients)
        several = [new_client() for _ in range(3)]
        for client in several:
            clients.join(client.transmission)
            client.socket.setblocking(True)
        loop.wake()
        for turn in range(20):
            for number, client in enumerate(several):
                data = bytes([turn + number]) * 4096
                client.send(WRITE, number * 4096, 4096, payload=data)
                assert client.socket.recv(16, 0x100) == OK
                client.send(READ, number * 4096, 4096)
                assert client.socket.recv(16 + 4096, 0x100) == OK + data
        for client in several:
            client.socket.close()
        while not all(client.left for client in several):
            pass
        front.stop()
        loop.wake()
        thread.join()
        assert clients.take_back() == []
        assert several[0].news & Transmission.GONE
