# SPDX-License-Identifier: Apache-2.0
"""Where the server listens, what it calls itself, and how it ends."""

import asyncio
import os
import socket
import stat
from pathlib import Path

import pytest
from nbd_client import NbdClient
from served_disk import Served, served_disk

from xvd.errors import ConfigError
from xvd.export.nbd import NbdServer


async def listen(served: Served, path: Path, mode: int = 0o660) -> NbdServer:
    """A second server for the same disk."""
    server = NbdServer(served.disk, name=served.server.name)
    await server.listen_unix(path, mode)
    return server


async def figures(server: NbdServer) -> dict[str, int]:
    return server.counters()


@pytest.mark.parametrize("mode", [0o660, 0o600])
def test_the_socket_has_its_mode(served: Served, tmp_path: Path, mode: int) -> None:
    server = served.call(listen(served, tmp_path / "other", mode))
    found = stat.S_IMODE((tmp_path / "other").stat().st_mode)
    served.call(server.close())
    assert found == mode


def test_a_live_servers_socket_is_not_taken(served: Served) -> None:
    with pytest.raises(ConfigError, match="a server answers there already"):
        served.call(listen(served, served.socket))
    with NbdClient(served.socket) as client:
        assert client.go("disk").read(0, 1) == b"\0"


def test_a_dead_servers_socket_is_replaced(served: Served, tmp_path: Path) -> None:
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / "dead"))
    dead.close()
    server = served.call(listen(served, tmp_path / "dead"))
    with NbdClient(tmp_path / "dead") as client:
        client.go()
    served.call(server.close())


def test_what_is_no_socket_is_not_taken(served: Served, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigError, match="is not a socket"):
        served.call(listen(served, tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    ("path", "text"),
    [("missing/nbd.sock", "cannot listen there"), ("x" * 200, "too long for a socket's path")],
)
def test_an_impossible_path_is_the_users_mistake(
    served: Served, tmp_path: Path, path: str, text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        served.call(listen(served, tmp_path / path))


def test_closing_removes_the_socket(served: Served, tmp_path: Path) -> None:
    server = served.call(listen(served, tmp_path / "other"))
    served.call(server.close())
    assert not (tmp_path / "other").exists()


def test_closing_leaves_a_successors_socket(served: Served, tmp_path: Path) -> None:
    first = served.call(listen(served, tmp_path / "other"))
    (tmp_path / "other").unlink()
    second = served.call(listen(served, tmp_path / "other"))
    served.call(first.close())
    assert (tmp_path / "other").exists()
    served.call(second.close())


def test_closing_disconnects_clients_and_may_be_repeated(served: Served, tmp_path: Path) -> None:
    server = served.call(listen(served, tmp_path / "other"))
    with NbdClient(tmp_path / "other") as client, NbdClient(tmp_path / "other") as silent:
        client.go()
        served.call(server.close())
        served.call(server.close())
        assert client.until_end() == b""
        silent.until_end()


def test_closing_answers_what_is_in_progress(served: Served, tmp_path: Path) -> None:
    server = served.call(listen(served, tmp_path / "other"))
    with NbdClient(tmp_path / "other") as client:
        client.go()
        client.request(6, 0, 16 << 20)  # WRITE_ZEROES, many pieces
        while not served.call(figures(server))["in_flight"]:
            pass
        served.call(server.close())
        assert len(client.until_end()) == 16


@pytest.mark.slow
def test_a_disk_that_does_not_answer_does_not_hold_up_closing(tmp_path: Path) -> None:
    with served_disk("memory:1M", tmp_path, layers=["delay:write=1"]) as served:
        with NbdClient(served.socket) as client:
            client.go().request(1, 0, 512, payload=bytes(512))
            while not served.call(figures(served.server))["in_flight"]:
                pass
            served.call(served.server.close(timeout_s=0.01))
            assert client.until_end() == b""
            assert served.call(figures(served.server))["in_flight"] == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", "nbd+unix:///?socket="),
        ("disk", "nbd+unix:///disk?socket="),
        ("a b?&#ä", "nbd+unix:///a%20b%3F%26%23%C3%A4?socket="),
    ],
)
def test_the_uri_is_quoted(served: Served, tmp_path: Path, name: str, expected: str) -> None:
    async def uri() -> str:
        async with NbdServer(served.disk, name=name) as server:
            await server.listen_unix(tmp_path / "a&b")
            return server.uri

    assert served.call(uri()) == expected + str(tmp_path) + "/a%26b"


def test_a_relative_path_is_absolute_in_the_uri(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    server = served.call(listen(served, Path("here")))
    uri = server.uri
    served.call(server.close())
    assert uri == f"nbd+unix:///disk?socket={tmp_path}/here"


def test_tcp_on_any_free_port(served: Served) -> None:
    async def scenario() -> list[str]:
        async with NbdServer(served.disk, name="d") as server:
            first = await server.listen_tcp(port=0)
            await server.listen_tcp("::1", 0)
            host, port = first.removeprefix("nbd://").removesuffix("/d").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            greeting = await reader.readexactly(18)
            writer.close()
            await writer.wait_closed()
            return [greeting.decode(), *server.uris]

    greeting, first, second = served.call(scenario())
    assert greeting == "NBDMAGICIHAVEOPT\0\3"
    assert first.startswith("nbd://127.0.0.1:")
    assert second.startswith("nbd://[::1]:")


def test_a_port_in_use_is_the_users_mistake(served: Served) -> None:
    async def scenario() -> None:
        async with NbdServer(served.disk) as server:
            port = int((await server.listen_tcp(port=0)).split(":")[2].rstrip("/"))
            await server.listen_tcp(port=port)

    with pytest.raises(ConfigError, match="cannot listen there"):
        served.call(scenario())


def test_no_uri_before_it_listens(served: Served) -> None:
    async def uri() -> str:
        return NbdServer(served.disk).uri

    with pytest.raises(ConfigError, match="listens nowhere"):
        served.call(uri())


@pytest.mark.parametrize("text", ["x" * 4097, "a\0b"])
def test_texts_that_nbd_cannot_carry(served: Served, text: str) -> None:
    async def make() -> None:
        NbdServer(served.disk, description=text)

    with pytest.raises(ConfigError):
        served.call(make())


async def listen_briefly(served: Served, path: Path) -> NbdServer:
    server = NbdServer(served.disk, connections_max=1, patience_s=0.05)
    await server.listen_unix(path)
    return server


def test_a_client_that_does_not_negotiate_loses_its_place(served: Served, tmp_path: Path) -> None:
    server = served.call(listen_briefly(served, tmp_path / "other"))
    with NbdClient(tmp_path / "other") as silent:
        silent.greet()
        assert silent.until_end() == b""
    served.call(server.close())


def test_a_client_that_negotiated_may_be_idle(served: Served, tmp_path: Path) -> None:
    server = served.call(listen_briefly(served, tmp_path / "other"))
    with NbdClient(tmp_path / "other") as idle:
        idle.go()
        served.call(asyncio.sleep(0.1))  # twice the patience
        assert idle.read(0, 1) == b"\0"
    served.call(server.close())


def test_a_client_that_does_not_read_its_last_replies_loses_its_place(
    served: Served, tmp_path: Path
) -> None:
    server = served.call(listen_briefly(served, tmp_path / "other"))
    with NbdClient(tmp_path / "other") as client:
        client.go()
        for _ in range(8):
            client.request(0, 0, 1 << 20)
        client.request(2)
        while served.call(figures(server))["connected"]:
            pass
        assert len(client.until_end()) < 8 << 20
    served.call(server.close())


def test_counters(served: Served) -> None:
    with NbdClient(served.socket) as client:
        client.go()
        client.write(0, bytes(1000))
        client.read(0, 500)
        client.ask(99)
        counted = served.call(figures(served.server))
    assert counted == {
        "connected": 1,
        "in_flight": 0,
        "held_bytes": 0,
        "connections": 1,
        "turned_away": 0,
        "idle_cut": 0,
        "handshakes": 1,
        "malformed": 0,
        "requests": 3,
        "rejected": 1,
        "failed": 0,
        "bytes_read": 500,
        "bytes_written": 1000,
    }


def test_descriptors_are_given_back(served: Served, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    server = served.call(listen(served, tmp_path / "other"))
    with NbdClient(tmp_path / "other") as client:
        client.go()
        served.call(server.close())
    assert len(os.listdir("/proc/self/fd")) == before
