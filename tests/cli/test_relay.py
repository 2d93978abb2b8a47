# SPDX-License-Identifier: Apache-2.0
"""How a worker without a socket of its own is reached."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from xvd.cli.asking import DaemonError, ask
from xvd.cli.control import ControlServer
from xvd.cli.relay import Over, Relay, follow_clients
from xvd.errors import ConfigError, PeerClosed
from xvd.service.supervisor import PING
from xvd.service.template import Worker


def test_a_worker_says_that_it_is_alive() -> None:
    async def work() -> None:
        ours, its = socket.socketpair()
        with ours, its:
            ours.setblocking(False)
            control, asked = ControlServer({}), asyncio.Event()
            end = follow_clients(
                its, lambda sock, reading: control.adopt(sock, reading=reading), asked.set
            )
            await asyncio.get_running_loop().sock_sendall(ours, PING)
            assert await asyncio.get_running_loop().sock_recv(ours, 1) == PING
            assert asked.is_set()
            end()

    asyncio.run(work())


class Heard:
    """Notes the calls that are heard of, and how they end."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.ends: list[bool | None] = []

    def __call__(self, *words: str) -> Over:
        self.calls.append(words)
        if words[2] == "/etc/shadow":
            raise ConfigError("not that one")
        return self.ends.append


@asynccontextmanager
async def relayed(
    path: Path, heard: Heard, **methods: Callable[..., object]
) -> AsyncIterator[Path]:
    """A worker's socket, whose supervisor hears of calls."""
    ours, its = socket.socketpair()
    with ours, its:
        worker = Worker.__new__(Worker)
        worker.channel = ours
        control = ControlServer(methods)

        async def present() -> Worker:
            return worker

        end = follow_clients(its, lambda sock, reading: control.adopt(sock, reading=reading), bool)
        relay = Relay(present, heard)
        (path / "control").mkdir()
        where = path / "control/backend-0-1"
        await relay.listen(where)
        yield where
        await relay.close()
        end()


async def swap(disk: str, image: str) -> str:
    if image == "/full.img":
        raise ConfigError("it does not fit")
    return f"{disk} swapped to {image}"


def test_calls_reach_the_worker_once_what_they_name_is_allowed(tmp_path: Path) -> None:
    heard = Heard()

    async def work() -> None:
        async with relayed(tmp_path, heard, swap=swap, stats=lambda: []) as path:
            told = await ask(path, "swap", disk="1/51712", image="/a.img")
            assert told == "1/51712 swapped to /a.img"
            with pytest.raises(DaemonError, match="not that one"):
                await ask(path, "swap", disk="1/51712", image="/etc/shadow")
            with pytest.raises(DaemonError, match="no method 'swap'"):
                await ask(tmp_path / "figures/backend-0-1", "swap", disk="1/1", image="/b.img")
            assert await ask(tmp_path / "figures/backend-0-1", "stats") == []
        assert not path.exists()

    asyncio.run(work())
    assert heard.calls == [("swap", "1/51712", "/a.img"), ("swap", "1/51712", "/etc/shadow")]
    assert heard.ends == [True]


def test_it_is_told_whether_a_call_was_done(tmp_path: Path) -> None:
    heard = Heard()

    async def work() -> None:
        async with relayed(tmp_path, heard, swap=swap, pivot=lambda disk: disk) as path:
            with pytest.raises(DaemonError, match="it does not fit"):
                await ask(path, "swap", disk="1/51712", image="/full.img")
            await ask(path, "pivot", disk="1/51712")

    asyncio.run(work())
    assert heard.calls[1] == ("pivot", "1/51712", "")
    assert heard.ends == [False, True]


def test_nobody_knows_what_a_worker_has_done_that_ended_meanwhile(tmp_path: Path) -> None:
    heard = Heard()

    async def work() -> None:
        async def die(disk: str, image: str) -> None:
            for task in asyncio.all_tasks():
                if "adopt" in repr(task.get_coro()):
                    task.cancel()
            await asyncio.sleep(0)

        async with relayed(tmp_path, heard, swap=die) as path:
            with pytest.raises(PeerClosed, match="the daemon closed the connection"):
                await ask(path, "swap", disk="1/51712", image="/a.img")

    asyncio.run(work())
    assert heard.ends == [None]
