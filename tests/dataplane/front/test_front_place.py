# SPDX-License-Identifier: Apache-2.0
"""Operations whose data lies in granted pages: nothing is copied, nobody is starved, and what the
pages hold is not lost when their queue is."""

from collections.abc import Iterator

import pytest
from rig_client import (
    READ,
    WRITE,
    Client,
    ClientWorld,
    client_world,
    end,
    new_client,
    settle,
    waiting_client,
)
from rig_front import FrontWorld
from rig_queue import QueueWorld

from xvd.dataplane.front.load import Load
from xvd.dataplane.front.options import FrontOptions
from xvd.dataplane.front.queue import FrontQueue
from xvd.dataplane.front.waiting_room import WaitingRoom
from xvd.dataplane.loop.loop import Loop
from xvd.errors import LocalProtocolError
from xvd.export import nbd_protocol as nbd

OK = nbd.simple_reply(7)
KEPT = {"persistent": True, "keeping": True}


def placed(world: ClientWorld) -> int:
    return int(world.front.counters()["placed"])


@pytest.fixture
def served() -> Iterator[tuple[ClientWorld, Client]]:
    with client_world(**KEPT) as (world, client):
        yield world, client
        world.serve(b"end!")
        settle(world.clients)
        client.received()
        settle(world.clients)
        assert placed(world) == 0


def test_what_is_read_is_sent_from_where_the_backend_put_it(
    served: tuple[ClientWorld, Client],
) -> None:
    world, client = served
    client.send(READ, 4096, 12288)
    [request] = world.on_ring()
    assert placed(world) == 3
    world.fill(request, b"data")
    world.reply(request)
    settle(world.clients)
    assert client.received() == OK + b"data" * 3072
    assert placed(world) == 0


@pytest.mark.parametrize("length", [512, 4096 + 512, 40_960, 180_224])
def test_a_payload_is_received_into_granted_pages(
    served: tuple[ClientWorld, Client], length: int
) -> None:
    world, client = served
    payload = bytes(i * 7 % 251 for i in range(length))
    client.send(WRITE, 512, length, payload=payload)
    requests = world.on_ring()
    assert placed(world) == (length + 4095) // 4096
    assert b"".join(world.data(request) for request in requests) == payload
    world.reply(*requests)
    settle(world.clients)
    assert client.received() == OK


def test_neighbours_that_are_placed_are_not_joined(served: tuple[ClientWorld, Client]) -> None:
    world, client = served
    client.send(READ, 0, 512)
    client.send(READ, 512, 512)
    requests = world.on_ring()
    assert len(requests) == 2
    world.reply(*requests)


def test_a_client_that_reads_no_replies_leaves_half_of_the_pages_to_others() -> None:
    with ClientWorld(pool=64, **KEPT) as world:
        clients = world.serve_clients()
        lazy, other = new_client(), new_client()
        clients.join(lazy.transmission)
        clients.join(other.transmission)
        for _ in range(2):  # its socket takes the first replies, and no more of them
            for n in range(7):
                lazy.send(READ, n * 65536, 40_960)
            world.serve(b"lazy")
        assert 20 <= placed(world) <= 32
        other.send(READ, 0, 32768)
        world.serve(b"data")
        settle(clients)
        assert other.received() == OK + b"data" * 8192
        end(clients, lazy, world.serve)
        end(clients, other, world.serve)
        assert placed(world) == 0


@pytest.mark.parametrize("without", [{}, {**KEPT, "trusted": False}, {**KEPT, "pool": 11}])
def test_where_nothing_can_be_placed_it_is_copied(without: dict[str, bool]) -> None:
    """Mapping for each request; a backend that must see no stale byte; a pool of one request."""
    with client_world(**without) as (world, client):
        client.send(READ, 0, 4096)
        [request] = world.on_ring()
        assert placed(world) == 0
        world.fill(request, b"data")
        world.reply(request)
        settle(world.clients)
        assert client.received() == OK + b"data" * 1024


def test_a_payload_that_the_queue_does_not_take_goes_the_long_way() -> None:
    with client_world(**KEPT) as (world, client):
        token = world.lock.hold(0, 8)
        client.send(WRITE, 0, 4096, payload=b"held" * 1024)
        assert world.on_ring() == []
        assert [asked.payload for asked in client.listen()] == [b"held" * 1024]
        assert placed(world) == 0
        world.lock.release(token)


def test_what_the_backend_fails_gives_its_pages_back(served: tuple[ClientWorld, Client]) -> None:
    world, client = served
    client.send(READ, 0, 4096)
    world.reply(*world.on_ring(), status=-1)
    [asked] = client.listen()
    assert (asked.command, placed(world)) == (READ, 0)
    client.transmission.answer(asked.slot, b"sorry")


def test_a_client_that_goes_gives_its_pages_back(served: tuple[ClientWorld, Client]) -> None:
    world, client = served
    client.send(WRITE, 0, 65536, payload=bytes(1000))
    settle(world.clients)
    assert placed(world) == 16
    client.socket.shutdown(1)
    settle(world.clients)
    assert placed(world) == 0


# ---- When the queue is over ----


def test_a_payload_goes_to_the_next_queue_whole_or_in_part() -> None:
    with ClientWorld(**KEPT) as first, ClientWorld(**KEPT) as second:
        clients = first.serve_clients()
        client = new_client()
        clients.join(client.transmission)
        client.send(WRITE, 0, 8192, cookie=1, payload=b"whole..." * 1024)
        client.send(WRITE, 65536, 65536, cookie=2, payload=b"part" * 4096)
        assert len(first.on_ring()) == 1
        clients = second.serve_clients(first.lock)
        for transmission in first.clients.take_back():
            clients.join(transmission)
        client.socket.sendall(b"rest" * 12288)
        requests = second.on_ring()
        assert b"".join(map(second.data, requests)) == (
            b"whole..." * 1024 + b"part" * 4096 + b"rest" * 12288
        )
        second.reply(*requests)
        settle(clients)
        assert client.received() == nbd.simple_reply(1) + nbd.simple_reply(2)
        end(clients, client)


def test_a_reply_that_is_half_sent_is_sent_to_its_end() -> None:
    with ClientWorld(segments_max=32, pool=1056, **KEPT) as world:
        clients = world.serve_clients()
        client = new_client()
        clients.join(client.transmission)
        for cookie in range(4):
            client.send(READ, 0, 256 << 10, cookie=cookie)
        world.serve(b"12345678")
        settle(clients)
        assert placed(world) > 0
        room = WaitingRoom(world.lock)
        for transmission in clients.take_back():
            room.join(transmission)
        world.drop_queue()
        del world.front, world.clients, clients
        world.pages.view[:] = bytes(len(world.pages.view))
        replies = b""
        while piece := client.received():
            replies += piece
            settle(room)
        data = b"12345678" * (32 << 10)
        assert replies == b"".join(nbd.simple_reply(cookie) + data for cookie in range(4))
        end(room, client)


def test_in_the_waiting_room_there_are_no_pages() -> None:
    with waiting_client() as (room, client):
        client.send(WRITE, 0, 4096, payload=bytes(4096))
        settle(room)
        assert [asked.payload for asked in client.listen()] == [bytes(4096)]


# ---- A load ----


def run(world: QueueWorld, **job: int) -> int:
    """The checksum of a load over a queue of its own ring."""
    pages = world.guest.grants.share(world.backend.domid, 32 * 11)
    front = FrontQueue(
        world.ring_pages.view, 32, 0, pages, world.port, FrontOptions(persistent=True)
    )
    load = Load(front, depth=4, size=65536, span=1 << 20, sequential=True, operations=16, **job)
    Loop(load).run()
    ended, errors, checksum = load.result
    assert (ended, errors, front.counters()["placed"] > 0) == (16, 0, bool(job.get("in_place")))
    return checksum


@pytest.mark.parametrize("in_place", [0, 1])
def test_a_load_in_place_moves_the_same_data(in_place: int) -> None:
    with QueueWorld(persistent=1056) as world:
        image = bytes(i * 11 % 253 for i in range(65536)) * 16
        world.engine.write(memoryview(image), 0)
        first = int.from_bytes(image[:8], "little")
        with world.running():
            assert run(world, in_place=in_place) == 16 * first % (1 << 64)


def test_what_a_load_writes_in_place_is_what_it_would_have_copied() -> None:
    images = []
    for in_place in (0, 1):
        with QueueWorld(persistent=1056) as world:
            with world.running():
                run(world, in_place=in_place, write_percent=100)
            image = bytearray(1 << 20)
            world.engine.read(memoryview(image), 0)
            images.append(bytes(image))
    assert images[0] == images[1] != bytes(1 << 20)


@pytest.mark.parametrize("wrong", [{"verify": 1}, {"depth": 64}])
def test_a_load_that_has_no_place_is_told_so(wrong: dict[str, int]) -> None:
    right = {"depth": 1, "size": 40960, "span": 1 << 20, "operations": 64}
    with FrontWorld(**KEPT) as world:
        with pytest.raises(LocalProtocolError, match="have no place in granted pages"):
            Load(world.queue, in_place=True, **(right | wrong))
        world.drop_queue()


# ---- The pool ----


@pytest.mark.beyond_xen("lasting")
def test_pages_that_were_neighbours_stay_neighbours() -> None:
    """A request's pages go back in their order, so that they are one piece of memory again."""
    with FrontWorld(**KEPT) as world:
        found = []
        for turn in range(3):
            buffer = bytearray(8 * 4096)
            world.queue.submit(0, 0, 64, buffer, turn)
            [request] = world.serve(b"data")
            found.append([segment.gref for segment in world.segments(request)])
            world.queue.reap()
        assert found[0] == found[1] == found[2] == sorted(found[0])
