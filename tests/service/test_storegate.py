# SPDX-License-Identifier: Apache-2.0
"""What a worker may ask the store for; the rest of the way is tests/service/test_sandbox.py's."""

import asyncio
import os
import socket

import pytest
from rig_disk import until

from xvd.errors import PeerClosed, XenstoreError
from xvd.machine.emulated.service import EmulatedHost
from xvd.machine.xs.client import XenstoreClient
from xvd.machine.xs.messages import HEADER, Message, MessageType
from xvd.service.sandbox.storegate import Rules, StoreGate
from xvd.types import DOM0
from xvd.xenbus.directory import report_error

RULES = Rules(DOM0, [1, 12], ["vbd", "vbd3"])
READ, WRITE, RM = MessageType.READ, MessageType.WRITE, MessageType.RM
LIST, WATCH, MKDIR = MessageType.DIRECTORY, MessageType.WATCH, MessageType.MKDIR


@pytest.mark.parametrize(
    ("request_type", "path", "allowed"),
    [
        (READ, "backend/vbd/1/51712/params", True),
        (READ, "backend/vbd3/12/51712/params", True),
        (READ, "/local/domain/0/backend/vbd/1/51712/state", True),
        (READ, "backend/vbd/2/51712/params", False),
        (READ, "backend/vbd/11/51712/params", False),
        (READ, "backend/vif/1/0/mac", False),
        (LIST, "backend/vbd", False),
        (READ, "/local/domain/1/device/vbd/51712/ring-ref", True),
        (READ, "/local/domain/2/device/vbd/51712/ring-ref", False),
        (READ, "/local/domain/10/name", False),
        (READ, "/libxl/1/type", True),
        (READ, "/libxl/1/dm-version", False),
        (READ, "/vm/x", False),
        (READ, "domid", False),
        (WATCH, "backend/vbd/1", True),
        (WATCH, "/", False),
        (WATCH, "@releaseDomain", False),
        (WRITE, "backend/vbd/1/51712/state", True),
        (WRITE, "backend/vbd/1/51712/feature-discard", True),
        (WRITE, "backend/vbd/1/51712", False),
        (WRITE, "backend/vbd/1", False),
        (WRITE, "backend/vbd/1/51712/params", False),
        (WRITE, "backend/vbd/1/51712/params/x", False),
        (WRITE, "backend/vbd/1/51712/mode", False),
        (WRITE, "backend/vbd/1/51712/sm-data/xvd-storage", False),
        (RM, "backend/vbd/1/51712/sm-data", False),
        (WRITE, "backend/vbd/1/51712/frontend", False),
        (WRITE, "/local/domain/1/device/vbd/51712/state", False),
        (WRITE, "error/backend/vbd/1/51712/error", True),
        (WRITE, "error/backend/vbd/2/51712/error", False),
        (MKDIR, "backend/vbd/1/51713", False),
        (RM, "backend/vbd/1/51712", True),
        (RM, "backend/vbd/1/51712/params", False),
        (RM, "backend/vbd/1", False),
        (RM, "backend", False),
        (RM, "error", False),
        (MessageType.SET_PERMS, "backend/vbd/1/51712", False),
        (MessageType.INTRODUCE, "1", False),
        (MessageType.CONTROL, "help", False),
        (MessageType.TRANSACTION_START, "", True),
    ],
)  # fmt: skip
def test_a_worker_asks(request_type: MessageType, path: str, allowed: bool) -> None:
    message = Message(request_type, 1, 0, path.encode() + b"\0value")

    assert RULES.allow(message) is allowed


async def gate_of(host: EmulatedHost) -> StoreGate:
    reader, writer = await asyncio.open_connection(sock=host.server.connect_local(DOM0))
    return StoreGate(reader, writer, RULES)


def test_refusals_and_answers_come_in_any_order_and_watches_fire() -> None:
    async def work() -> None:
        async with EmulatedHost() as host:
            gate = await gate_of(host)
            async with await XenstoreClient.from_socket(gate.theirs) as store:
                async with await store.watch("backend/vbd/1") as watch:
                    async with store.transaction() as tx:
                        await tx.write("backend/vbd/1/51712/state", "2")
                        with pytest.raises(XenstoreError, match="EACCES"):
                            await tx.write("backend/vbd/2/51712/state", "2")
                    assert {await anext(watch) for _ in range(2)} == {
                        "backend/vbd/1", "backend/vbd/1/51712/state",
                    }  # fmt: skip
            await gate.close()

    asyncio.run(work())


def test_an_error_is_told_and_taken_back() -> None:
    disk = "backend/vbd/1/51712"

    async def work() -> None:
        async with EmulatedHost() as host:
            gate = await gate_of(host)
            everything = await XenstoreClient.from_socket(host.server.connect_local(DOM0))
            await everything.write(f"{disk}/frontend", "/local/domain/1/device/vbd/51712")
            async with await XenstoreClient.from_socket(gate.theirs) as store, everything:
                await report_error(store, disk, "it failed")
                assert await everything.read(f"error/{disk}/error") == "it failed"
                await report_error(store, disk, "")
                assert not await everything.exists("error/backend/vbd/1")
            await gate.close()

    asyncio.run(work())


def test_one_that_talks_nonsense_is_cut_off() -> None:
    async def work() -> None:
        async with EmulatedHost() as host:
            gate = await gate_of(host)
            gate.theirs.sendall(HEADER.pack(MessageType.READ, 1, 0, 1 << 20))
            async with await XenstoreClient.from_socket(gate.theirs) as store:
                with pytest.raises(PeerClosed):
                    await store.read("backend/vbd/1/51712/state")
            await gate.close()

    asyncio.run(work())


@pytest.mark.parametrize("turns", range(8))
def test_it_gives_back_all_whenever_it_is_closed_after_its_worker_has_ended(turns: int) -> None:
    """By itself it does so in some turns of the event loop, in any of which it may be closed."""

    async def work() -> None:
        async with EmulatedHost() as host:
            descriptors = len(os.listdir("/proc/self/fd"))
            gate = await gate_of(host)
            async with await XenstoreClient.from_socket(gate.theirs) as store:
                assert not await store.exists("backend/vbd/1/51712/state")
            for _ in range(turns):
                await asyncio.sleep(0)
            await gate.close()
            await until(lambda: host.server.peers == set())
            assert len(os.listdir("/proc/self/fd")) == descriptors

    asyncio.run(work())


def test_it_ends_with_the_store() -> None:
    async def work() -> None:
        async with EmulatedHost() as host:
            ours, theirs = socket.socketpair()
            reader, writer = await asyncio.open_connection(sock=ours)
            gate = StoreGate(reader, writer, RULES)
            async with await XenstoreClient.from_socket(gate.theirs) as store:
                theirs.close()
                with pytest.raises(PeerClosed):
                    await store.read("backend/vbd/1/51712/state")
            await gate.close()
            assert host.server.peers == set()

    asyncio.run(work())
