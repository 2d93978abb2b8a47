# SPDX-License-Identifier: Apache-2.0
"""The asyncio client, against our server in the same event loop."""

import asyncio
import socket
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from xs_rig import served, with_server

from xvd.errors import PeerClosed, XenstoreError
from xvd.machine.xs import client as client_module
from xvd.machine.xs import requests
from xvd.machine.xs.client import Transaction, XenstoreClient
from xvd.machine.xs.messages import Message, MessageType
from xvd.machine.xs.server import XenstoreServer


def refused(code: str) -> AbstractContextManager[object]:
    return pytest.raises(XenstoreError, match=f"^{code}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "socket"


def test_values_go_and_come_back_as_text_and_as_bytes(path: Path) -> None:
    async def work(_: XenstoreServer, client: XenstoreClient) -> None:
        await client.write("/a/text", "café")
        await client.write("/a/bytes", b"\0\xff")
        assert await client.read("/a/text") == "café"
        assert await client.read_bytes("/a/bytes") == b"\0\xff"
        with refused("EINVAL"):
            await client.read("/a/bytes")

    with_server(path, work)


def test_nodes_come_go_and_are_listed(path: Path) -> None:
    async def work(_: XenstoreServer, client: XenstoreClient) -> None:
        await client.mkdir("/a/b")
        assert (await client.ls("/a"), await client.exists("/a/b")) == (["b"], True)
        await client.rm("/a/b")
        assert (await client.ls("/a"), await client.exists("/a/b")) == ([], False)
        assert await client.try_read("/a/b") is None
        with refused("ENOENT"):
            await client.read("/a/b")

    with_server(path, work)


@pytest.mark.slow
def test_a_large_directory_is_listed_whole(path: Path) -> None:
    async def work(_: XenstoreServer, client: XenstoreClient) -> None:
        names = [f"child-{index:04}" for index in range(1000)]
        await asyncio.gather(*(client.mkdir(f"/d/{name}") for name in names))
        assert await client.ls("/d") == names

    with_server(path, work)


def test_a_directory_that_changes_between_parts_is_listed_again(path: Path) -> None:
    replies = [
        (MessageType.ERROR, b"E2BIG\0"),
        (MessageType.DIRECTORY_PART, b"1\0old\0"),
        (MessageType.DIRECTORY_PART, b"2\0er\0\0"),
        (MessageType.DIRECTORY_PART, b"2\0new\0"),
        (MessageType.DIRECTORY_PART, b"2\0er\0\0"),
    ]

    async def run() -> None:
        ours, theirs = socket.socketpair()
        async with await XenstoreClient.from_socket(ours) as client:
            listing = asyncio.create_task(client.ls("/d"))
            reader, writer = await asyncio.open_connection(sock=theirs)
            for kind, payload in replies:
                header = await reader.readexactly(16)
                await reader.readexactly(int.from_bytes(header[12:], "little"))
                req_id = int.from_bytes(header[4:8], "little")
                writer.write(Message(kind, req_id, 0, payload).pack())
            assert await listing == ["new", "er"]
            writer.close()

    asyncio.run(run())


def test_permissions(path: Path) -> None:
    async def work(_: XenstoreServer, client: XenstoreClient) -> None:
        await client.mkdir("/a")
        await client.set_perms("/a", ["n1", "r2", "b3"])
        assert await client.get_perms("/a") == ["n1", "r2", "b3"]
        with refused("EINVAL"):
            await client.set_perms("/a", ["x1"])

    with_server(path, work)


def test_domains(path: Path) -> None:
    async def work(server: XenstoreServer, client: XenstoreClient) -> None:
        await client.introduce(5, 0, 9)
        await client.introduce(6, 0, 9)
        await client.set_target(6, 5)
        await client.resume(5)
        assert (await client.is_introduced(5), await client.is_introduced(7)) == (True, False)
        assert await client.get_domain_path(5) == "/local/domain/5"
        await client.release(5)
        assert await client.is_introduced(5) is False
        assert await client.control("check") == "OK"

    with_server(path, work)


def test_many_requests_are_in_flight_at_once(path: Path) -> None:
    async def work(_: XenstoreServer, client: XenstoreClient) -> None:
        await asyncio.gather(*(client.write(f"/a/{n}", str(n)) for n in range(200)))
        values = await asyncio.gather(*(client.read(f"/a/{n}") for n in range(200)))
        assert values == [str(n) for n in range(200)]

    with_server(path, work)


def test_requests_sent_at_once_are_answered_in_order_and_each_refused_by_itself(path: Path) -> None:
    async def work(_: XenstoreServer, client: XenstoreClient) -> None:
        paths = [f"/many/{number}" for number in range(3 * client_module.IN_FLIGHT_MAX)]
        asked = [requests.read(one) for one in paths]
        await client.ask_all([requests.write(one, one) for one in paths])
        await client.rm_each([paths[1], "/none/at/all"])

        answers = await client.ask_each(asked)

        assert str(answers.pop(1)) == "ENOENT"
        assert answers == [one.encode() for one in paths if one != paths[1]]
        assert await client.try_read_each(paths[:2]) == [paths[0], None]
        assert await client.which_exist(paths[:3]) == [paths[0], paths[2]]
        with refused("ENOENT"):
            await client.ask_all(asked)

    with_server(path, work)


def test_requests_too_large_or_with_a_nul_are_refused_here(path: Path) -> None:
    async def work(_: XenstoreServer, client: XenstoreClient) -> None:
        with refused("E2BIG"):
            await client.write("/a", bytes(4096))
        with refused("EINVAL"):
            await client.write("/a\0b", "")
        assert await client.ls("/") == ["tool"]

    with_server(path, work)


def test_a_transaction_commits_at_the_end_of_its_block(path: Path) -> None:
    async def work(_: XenstoreServer, client: XenstoreClient) -> None:
        async with client.transaction() as tx:
            await tx.write("/a", "1")
            assert (await tx.read("/a"), await client.try_read("/a")) == ("1", None)
        assert await client.read("/a") == "1"

    with_server(path, work)


def test_an_exception_aborts_a_transaction(path: Path) -> None:
    async def work(server: XenstoreServer, client: XenstoreClient) -> None:
        with pytest.raises(ZeroDivisionError):
            async with client.transaction() as tx:
                await tx.write("/a", str(1 // 0))
        assert await client.try_read("/a") is None
        assert server.store.counts.transactions == 0

    with_server(path, work)


def test_a_conflict_is_told_at_the_end_of_the_block(path: Path) -> None:
    async def work(server: XenstoreServer, client: XenstoreClient) -> None:
        with refused("EAGAIN"):
            async with client.transaction() as tx:
                await tx.ls("/")
                await client.mkdir("/a")
        assert server.store.counts.transactions == 0

    with_server(path, work)


def test_who_looks_at_everything_skips_the_events_of_it(path: Path) -> None:
    async def work(_: XenstoreServer, client: XenstoreClient) -> None:
        async with await client.watch("/d") as watch:
            for name in "abc":
                await client.write(f"/d/{name}", "1")
            assert await anext(watch) == "/d"
            watch.skip()
            await client.write("/d/last", "1")
            assert await anext(watch) == "/d/last"

    with_server(path, work)


def test_transact_repeats_until_no_conflict(path: Path) -> None:
    async def work(server: XenstoreServer, client: XenstoreClient) -> None:
        async def increment(tx: Transaction) -> int:
            value = int(await tx.read("/n")) + 1
            await tx.write("/n", str(value))
            return value

        await client.write("/n", "0")
        results = await asyncio.gather(*(client.transact(increment) for _ in range(8)))
        assert sorted(results) == list(range(1, 9))
        assert (await client.read("/n"), server.store.counts.transactions) == ("8", 0)

    with_server(path, work)


def test_transact_keeps_to_what_a_store_lets_a_guest_have(path: Path) -> None:
    async def work(server: XenstoreServer, client: XenstoreClient) -> None:
        seen: list[int] = []

        async def look(tx: Transaction) -> None:
            await tx.try_read("/n")
            seen.append(server.store.counts.transactions)

        await asyncio.gather(*(client.transact(look) for _ in range(40)))
        assert len(seen) == 40
        assert max(seen) == client_module.TRANSACTIONS_MAX < server.store.quotas.transactions

    with_server(path, work)


def test_transact_passes_other_errors_on(path: Path) -> None:
    async def work(_: XenstoreServer, client: XenstoreClient) -> None:
        with refused("ENOENT"):
            await client.transact(lambda tx: tx.read("/nothing"))

    with_server(path, work)


def test_a_start_that_is_cancelled_leaves_no_transaction_open(path: Path) -> None:
    async def work(server: XenstoreServer, client: XenstoreClient) -> None:
        async def enter() -> None:
            async with client.transaction():
                pytest.fail("it was cancelled before")

        entering = asyncio.create_task(enter())
        await asyncio.wait([entering], timeout=0)
        entering.cancel()
        await asyncio.gather(entering, return_exceptions=True)
        # Its answer comes before the first of these, its end before the second.
        await client.ls("/")
        await client.ls("/")
        assert server.store.counts.transactions == 0

    with_server(path, work)


def test_a_watch_yields_its_own_path_first_and_then_what_changed(path: Path) -> None:
    async def work(server: XenstoreServer, client: XenstoreClient) -> None:
        async with await client.watch("/a") as watch:
            assert await anext(watch) == "/a"
            await client.write("/a/b", "")
            assert await anext(watch) == "/a/b"
        assert server.store.counts.watches == 0

    with_server(path, work)


def test_a_relative_watch_and_one_with_a_depth(path: Path) -> None:
    async def work(_: XenstoreServer, client: XenstoreClient) -> None:
        watch = await client.watch("backend", token="mine", depth=1)
        await client.mkdir("/local/domain/0/backend/vbd")
        await client.mkdir("/local/domain/0/backend/vbd/5")
        await watch.close()
        assert [path async for path in watch] == ["backend", "backend/vbd"]

    with_server(path, work)


def test_events_of_one_path_are_held_once(path: Path) -> None:
    async def work(_: XenstoreServer, client: XenstoreClient) -> None:
        watch = await client.watch("/a")
        for path in ("/a/x", "/a/y", "/a/x", "/a/x"):
            await client.write(path, "")
        await watch.close()
        assert [path async for path in watch] == ["/a", "/a/x", "/a/y"]

    with_server(path, work)


def test_too_many_paths_become_the_watchs_own(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "WATCH_PENDING_MAX", 3)

    async def work(_: XenstoreServer, client: XenstoreClient) -> None:
        watch = await client.watch("/a")
        for index in range(4):
            await client.write(f"/a/{index}", "")
        await watch.close()
        assert [path async for path in watch] == ["/a", "/a/3"]

    with_server(path, work)


def test_a_token_is_used_once(path: Path) -> None:
    async def work(server: XenstoreServer, client: XenstoreClient) -> None:
        await client.watch("/a", token="t")
        with refused("EEXIST"):
            await client.watch("/b", token="t")
        assert server.store.counts.watches == 1

    with_server(path, work)


def test_a_watch_that_is_refused_is_not_kept(path: Path) -> None:
    async def work(_: XenstoreServer, client: XenstoreClient) -> None:
        with refused("EINVAL"):
            await client.watch("/a b", token="t")
        await client.watch("/a", token="t")

    with_server(path, work)


def test_reset_watches_ends_every_iteration(path: Path) -> None:
    async def work(server: XenstoreServer, client: XenstoreClient) -> None:
        watch = await client.watch("/a")
        await client.reset_watches()
        assert [path async for path in watch] == ["/a"]
        assert server.store.counts.watches == 0

    with_server(path, work)


def test_an_event_before_the_reply_and_with_any_req_id_is_taken() -> None:
    # As Linux's xenbus device does it.
    async def run() -> None:
        ours, theirs = socket.socketpair()
        async with await XenstoreClient.from_socket(ours) as client:
            watching = asyncio.create_task(client.watch("/a", token="t"))
            reader, writer = await asyncio.open_connection(sock=theirs)
            header = await reader.readexactly(16 + len(b"/a\0t\0"))
            req_id = int.from_bytes(header[4:8], "little")
            writer.write(Message(MessageType.WATCH_EVENT, req_id, 99, b"/a\0t\0").pack())
            writer.write(Message(MessageType.WATCH, req_id, 0, b"OK\0").pack())
            watch = await watching
            assert await anext(watch) == "/a"
            writer.close()

    asyncio.run(run())


def test_when_the_daemon_dies_everybody_is_told_at_once() -> None:
    async def run() -> None:
        ours, theirs = socket.socketpair()
        client = await XenstoreClient.from_socket(ours)
        watching = asyncio.create_task(client.watch("/a", token="t"))
        reader, writer = await asyncio.open_connection(sock=theirs)
        header = await reader.readexactly(16 + len(b"/a\0t\0"))
        writer.write(Message(MessageType.WATCH, int(header[4]), 0, b"OK\0").pack())
        watch = await watching
        waiting = [asyncio.create_task(client.read("/a")) for _ in range(3)]
        waiting.append(asyncio.create_task(anext(watch)))
        await reader.readexactly(3 * (16 + len(b"/a\0")))
        writer.close()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [PeerClosed] * 4
        with pytest.raises(PeerClosed):
            await client.read("/a")
        await client.close()

    asyncio.run(run())


def test_a_daemon_that_talks_nonsense_is_left() -> None:
    async def run() -> None:
        ours, theirs = socket.socketpair()
        client = await XenstoreClient.from_socket(ours)
        reading = asyncio.create_task(client.read("/a"))
        theirs.sendall(b"\xff" * 16)
        with pytest.raises(PeerClosed, match="EIO"):
            await reading
        await client.close()
        theirs.close()

    asyncio.run(run())


def test_closing_ends_watches_and_fails_waiters(path: Path) -> None:
    async def run() -> None:
        async with served(path):
            client = await XenstoreClient.connect(path)
            watch = await client.watch("/a")
            await client.close()
            assert [path async for path in watch] == ["/a"]
            with pytest.raises(PeerClosed, match="was closed"):
                await client.read("/a")

    asyncio.run(run())


def test_nobody_listening_is_told(path: Path) -> None:
    with pytest.raises(PeerClosed, match="no xenstore answers"):
        asyncio.run(XenstoreClient.connect(path))


def test_transact_gives_up_on_a_node_that_is_changed_all_the_time(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "CONFLICT_PAUSE_S", 0)

    async def work(server: XenstoreServer, client: XenstoreClient) -> None:
        tries = 0

        async def write(tx: Transaction) -> None:
            nonlocal tries
            tries += 1
            await tx.try_read("/n")
            await client.write("/n", str(tries))
            await tx.write("/m", "1")

        with refused("EAGAIN"):
            await client.transact(write)
        assert (tries, server.store.counts.transactions) == (client_module.CONFLICTS_MAX, 0)

    with_server(path, work)
