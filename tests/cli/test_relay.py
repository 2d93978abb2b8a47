# SPDX-License-Identifier: Apache-2.0
"""How a worker without a socket of its own is reached."""

import asyncio
import socket
from pathlib import Path

import pytest

from xvd.cli.asking import DaemonError, ask
from xvd.cli.control import ControlServer
from xvd.cli.relay import Relay, follow_clients
from xvd.errors import ConfigError
from xvd.service.supervisor import PING
from xvd.service.template import Worker


def test_a_worker_says_that_it_is_alive() -> None:
    async def work() -> None:
        ours, its = socket.socketpair()
        with ours, its:
            ours.setblocking(False)
            control = ControlServer({})
            end = follow_clients(its, lambda sock, reading: control.adopt(sock, reading=reading))
            await asyncio.get_running_loop().sock_sendall(ours, PING)
            assert await asyncio.get_running_loop().sock_recv(ours, 1) == PING
            end()

    asyncio.run(work())


def test_calls_reach_the_worker_once_what_they_name_is_allowed(tmp_path: Path) -> None:
    heard: list[str] = []

    async def allow(image: str) -> None:
        heard.append(image)
        if image == "/etc/shadow":
            raise ConfigError("not that one")

    async def swap(image: str) -> str:
        return f"swapped to {image}"

    async def work() -> None:
        ours, its = socket.socketpair()
        with ours, its:
            worker = Worker.__new__(Worker)
            worker.channel = ours
            control = ControlServer({"swap": swap, "stats": lambda: []})

            async def present() -> Worker:
                return worker

            end = follow_clients(its, lambda sock, reading: control.adopt(sock, reading=reading))
            relay = Relay(present, allow)
            (tmp_path / "control").mkdir()
            path = tmp_path / "control/backend-0-1"
            await relay.listen(path)
            assert await ask(path, "swap", image="/a.img") == "swapped to /a.img"
            with pytest.raises(DaemonError, match="not that one"):
                await ask(path, "swap", image="/etc/shadow")
            with pytest.raises(DaemonError, match="no method 'swap'"):
                await ask(tmp_path / "figures/backend-0-1", "swap", image="/b.img")
            assert await ask(tmp_path / "figures/backend-0-1", "stats") == []
            await relay.close()
            end()
            assert not path.exists()

    asyncio.run(work())
    assert heard == ["/a.img", "/etc/shadow"]
