# SPDX-License-Identifier: Apache-2.0
"""What clients of an export take from each other: places, and memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nbd_client import NbdClient
from served_disk import Served

from xvd.export.nbd import NbdServer

READ, WRITE = 0, 1
PIECE = 1 << 20

Limited = Callable[..., NbdServer]


@pytest.fixture
def limited(served: Served, tmp_path: Path) -> Limited:
    """Another export of the disk at tmp_path/other, with limits of its own."""

    async def listen(limits: dict[str, Any]) -> NbdServer:
        server = NbdServer(served.disk, **limits)
        await server.listen_unix(tmp_path / "other")
        return server

    return lambda **limits: served.call(listen(limits))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "other"


async def figures(server: NbdServer) -> dict[str, int]:
    return server.counters()


def test_who_is_idle_for_longest_makes_place_for_a_new_client(
    served: Served, limited: Limited, path: Path
) -> None:
    server = limited(connections_max=2)
    with NbdClient(path) as first, NbdClient(path) as second:
        first.go()
        second.go()
        for client in (second, first):
            assert client.read(0, 1) == b"\0"
            while served.call(figures(server))["held_bytes"]:
                pass  # the client may have its reply before the server has noted that it has

        with NbdClient(path) as third:
            third.go()
            assert second.until_end() == b""
            assert (third.read(0, 1), first.read(0, 1)) == (b"\0", b"\0")
    assert served.call(figures(server))["idle_cut"] == 1
    served.call(server.close())


def test_nobody_with_something_in_progress_makes_place(
    served: Served, limited: Limited, path: Path
) -> None:
    server = limited(connections_max=1)
    with NbdClient(path) as busy:
        busy.go()
        busy.request(WRITE, 0, 4096)  # its data is still to come
        while not served.call(figures(server))["in_flight"]:
            pass

        with NbdClient(path) as late:
            assert late.until_end() == b""

        busy.send(bytes(4096))
        assert busy.reply().error == 0
    assert served.call(figures(server))["turned_away"] == 1
    served.call(server.close())


@pytest.mark.parametrize(("command", "length"), [(WRITE, 4096), (READ, 4 * PIECE)])
def test_who_stops_within_a_request_or_a_reply_makes_place_in_the_end(
    served: Served, limited: Limited, path: Path, command: int, length: int
) -> None:
    server = limited(connections_max=1, patience_s=0.1)
    with NbdClient(path) as stalled:
        stalled.go()
        stalled.request(command, 0, length)  # no data follows, and no reply is read
        while not served.call(figures(server))["held_bytes"]:
            pass

        for _ in range(20_000):
            with NbdClient(path) as late:
                if late.socket.recv(1):  # greeted: there was a place
                    break
        assert served.call(figures(server))["idle_cut"] == 1
    served.call(server.close())


@pytest.mark.slow
def test_all_clients_together_hold_no_more_than_the_export_allows(
    served: Served, limited: Limited, path: Path
) -> None:
    # Each alone might hold 64 MiB; none reads what it has asked for.
    room = 8 * PIECE
    server = limited(memory_max=room, patience_s=0.05)
    silent = [NbdClient(path) for _ in range(6)]
    for client in silent:
        client.go()
        for _ in range(16):
            client.request(READ, 0, PIECE)

    with NbdClient(path) as reader:
        reader.go()
        assert reader.read(0, PIECE) == bytes(PIECE)  # who held memory for nothing was cut

    assert server.memory.used <= room + PIECE
    for client in silent:
        client.socket.close()
    served.call(server.close())
    assert server.memory.used == 0
