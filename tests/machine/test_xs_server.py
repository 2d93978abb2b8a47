# SPDX-License-Identifier: Apache-2.0
"""The server: where it listens, and what hostile clients cost (themselves, and nobody else)."""

import asyncio
import logging
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from xs_rig import served, with_server

from xvd.errors import ConfigError, PeerClosed, XenstoreError
from xvd.loglimit import BURST
from xvd.machine.xs.client import XenstoreClient
from xvd.machine.xs.messages import HEADER, Framer, Message, MessageType
from xvd.machine.xs.server import XenstoreServer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "socket"


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def connect(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_unix_connection(str(path))


async def until_idle(server: XenstoreServer, peers: int) -> None:
    """Wait until so many connections are left."""
    while len(server.peers) > peers:
        server.peer_left.clear()
        await server.peer_left.wait()


def test_the_socket_is_for_its_group_and_goes_with_the_server(path: Path) -> None:
    modes = []

    async def work(_: XenstoreServer, __: XenstoreClient) -> None:
        modes.append(mode_of(path))

    with_server(path, work)
    assert modes == [0o660]
    assert list(path.parent.iterdir()) == []


def test_a_live_server_is_not_replaced(path: Path) -> None:
    async def work(server: XenstoreServer, client: XenstoreClient) -> None:
        with pytest.raises(ConfigError, match="answers there already"):
            await XenstoreServer(server.store).listen(path)
        assert await client.ls("/") == ["tool"]

    with_server(path, work)


def test_a_dead_servers_socket_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    async def work(_: XenstoreServer, client: XenstoreClient) -> None:
        assert await client.ls("/") == ["tool"]

    with_server(path, work)


def test_what_is_no_socket_is_left_alone(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        with_server(path, None)  # type: ignore[arg-type]
    assert path.read_text() == "precious"


def test_a_directory_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        with_server(tmp_path / "missing" / "socket", None)  # type: ignore[arg-type]


def test_closing_ends_every_connection(path: Path) -> None:
    async def run() -> None:
        async with served(path) as server:
            client = await XenstoreClient.connect(path)
            watch = await client.watch("/a", token="t")
            await anext(watch)
        with pytest.raises(PeerClosed):
            await anext(watch)
        assert server.store.counts.connections == 0
        await client.close()

    asyncio.run(run())


def test_a_guests_socket_has_its_rights_and_its_directory(path: Path) -> None:
    async def work(server: XenstoreServer, client: XenstoreClient) -> None:
        await client.introduce(5, 0, 9)
        await client.mkdir("/local/domain/5")
        await client.set_perms("/local/domain/5", ["n5"])
        async with await XenstoreClient.from_socket(server.connect_local(5)) as guest:
            await guest.write("name", "five")
            with pytest.raises(XenstoreError, match="EACCES"):
                await guest.write("/tool/x", "")
            with pytest.raises(XenstoreError, match="EACCES"):
                await guest.introduce(6, 0, 9)
        assert await client.read("/local/domain/5/name") == "five"

    with_server(path, work)


def test_releasing_a_domain_ends_its_connection(path: Path) -> None:
    async def work(server: XenstoreServer, client: XenstoreClient) -> None:
        await client.introduce(5, 0, 9)
        async with await XenstoreClient.from_socket(server.connect_local(5)) as guest:
            watch = await guest.watch("x")
            await anext(watch)
            await client.release(5)
            with pytest.raises(PeerClosed):
                await anext(watch)
        assert server.store.counts.connections == 1

    with_server(path, work)


def test_a_domain_that_does_not_exist_gets_no_connection(
    path: Path, expect_log: Callable[[str], None]
) -> None:
    expect_log("there is no domain 32753")

    async def work(server: XenstoreServer, _: XenstoreClient) -> None:
        async with await XenstoreClient.from_socket(server.connect_local(0x7FF1)) as nobody:
            with pytest.raises(PeerClosed):
                await nobody.ls("/")

    with_server(path, work)


@pytest.mark.parametrize(
    "sent",
    [
        HEADER.pack(2, 0, 0, 4097),
        HEADER.pack(2, 0, 0, 0xFFFFFFFF),
        b"\xff" * 4096,
        Message(2, 1, 0, b"/tool\0").pack() + b"\xff" * 16,
    ],
    ids=["one-too-long", "huge", "noise", "good-then-noise"],
)
def test_a_bad_length_costs_that_connection_only(
    path: Path, sent: bytes, expect_log: Callable[[str], None]
) -> None:
    expect_log("a header claims")

    async def work(server: XenstoreServer, client: XenstoreClient) -> None:
        reader, writer = await connect(path)
        writer.write(sent)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
            await reader.readexactly(1000)
        writer.close()
        assert await client.ls("/") == ["tool"]
        assert server.store.counts.connections == 1

    with_server(path, work)


@pytest.mark.parametrize("size", [1, 15, 16, 20])
def test_half_a_message_and_gone_leaves_nothing(path: Path, size: int) -> None:
    async def work(server: XenstoreServer, _: XenstoreClient) -> None:
        _, writer = await connect(path)
        writer.write(Message(MessageType.WATCH, 1, 0, b"/\0t\0").pack())
        writer.write(Message(MessageType.WRITE, 2, 0, b"/x\0value").pack()[:size])
        writer.close()
        await writer.wait_closed()
        await until_idle(server, 1)
        counts = server.store.counts
        assert (counts.connections, counts.watches, counts.nodes) == (1, 0, 3)

    with_server(path, work)


def test_a_message_in_single_bytes_is_answered(path: Path) -> None:
    async def work(_: XenstoreServer, client: XenstoreClient) -> None:
        reader, writer = await connect(path)
        for byte in Message(MessageType.GET_DOMAIN_PATH, 7, 0, b"5\0").pack():
            writer.write(bytes([byte]))
            await client.ls("/")
        reply = await reader.readexactly(16 + 16)
        assert reply == Message(10, 7, 0, b"/local/domain/5\0").pack()
        writer.close()

    with_server(path, work)


def test_an_unknown_type_is_answered_and_the_connection_goes_on(path: Path) -> None:
    async def work(_: XenstoreServer, __: XenstoreClient) -> None:
        reader, writer = await connect(path)
        writer.write(Message(4711, 7, 3, b"").pack() + Message(10, 8, 0, b"5\0").pack())
        reply = await reader.readexactly(16 + 7 + 16 + 16)
        error, answer = Message(16, 7, 3, b"ENOSYS\0"), Message(10, 8, 0, b"/local/domain/5\0")
        assert reply == error.pack() + answer.pack()
        writer.close()

    with_server(path, work)


@pytest.mark.slow
def test_a_client_that_does_not_read_is_not_read_either(path: Path) -> None:
    async def work(server: XenstoreServer, client: XenstoreClient) -> None:
        await client.write("/big", bytes(4000))
        with socket.socket(socket.AF_UNIX) as flood:
            flood.connect(str(path))
            flood.setblocking(False)
            request = Message(MessageType.READ, 1, 0, b"/big\0").pack() * 100
            sent = 0
            with suppress(BlockingIOError):
                while sent < 100_000_000:
                    sent += flood.send(request)
                    # Two round trips let the server take all that it is going to take.
                    await client.ls("/")
                    await client.ls("/")
            assert sent < 2_000_000
        await until_idle(server, 1)
        assert await client.ls("/") == ["tool", "big"]

    with_server(path, work)


@pytest.mark.slow
def test_a_flood_of_one_event_is_held_once(path: Path) -> None:
    async def work(server: XenstoreServer, client: XenstoreClient) -> None:
        with socket.socket(socket.AF_UNIX) as lazy:
            lazy.connect(str(path))
            lazy.sendall(Message(MessageType.WATCH, 1, 0, b"/a\0" + b"t" * 1000 + b"\0").pack())
            for _ in range(5000):
                await client.write("/a", "")
            assert len(server.peers) == 2
            lazy.setblocking(False)
            framer, events = Framer(), 0
            with suppress(BlockingIOError):
                while True:
                    framer.feed(lazy.recv(65536))
                    while framer.next_message() is not None:
                        events += 1
            assert events < 1000

    with_server(path, work)


@pytest.mark.slow
def test_a_flood_of_different_events_cuts_the_connection_that_does_not_read(
    path: Path, expect_log: Callable[[str], None]
) -> None:
    expect_log("bytes of events wait for it")

    async def work(server: XenstoreServer, client: XenstoreClient) -> None:
        with socket.socket(socket.AF_UNIX) as lazy:
            lazy.connect(str(path))
            lazy.sendall(Message(MessageType.WATCH, 1, 0, b"/a\0" + b"t" * 3000 + b"\0").pack())
            for index in range(2000):
                await client.write(f"/a/{index % 500}", "")
                if len(server.peers) == 1:
                    break
            assert (len(server.peers), server.store.counts.watches) == (1, 0)
            assert index > 100

    with_server(path, work, backlog_max=200_000)


def test_a_busy_client_does_not_keep_others_out(path: Path) -> None:
    async def work(server: XenstoreServer, client: XenstoreClient) -> None:
        reader, writer = await connect(path)
        writer.write(Message(MessageType.READ, 1, 0, b"/tool\0").pack() * 2000)
        drained = asyncio.create_task(reader.readexactly(2000 * 16))
        await client.ls("/")
        assert not drained.done()
        await drained
        writer.close()

    with_server(path, work)


def test_a_client_that_is_cut_again_and_again_is_told_of_a_few_times(
    path: Path, expect_log: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    expect_log("cutting a connection of domain 0")

    async def work(server: XenstoreServer, _: XenstoreClient) -> None:
        for _ in range(50):
            reader, writer = await connect(path)
            writer.write(b"\xff" * 16)
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()

    with_server(path, work)

    assert len(caplog.records) == BURST[logging.WARNING]
