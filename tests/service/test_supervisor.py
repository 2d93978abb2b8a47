# SPDX-License-Identifier: Apache-2.0
"""The supervisor and the template, where workers do nothing but end."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest
from rig_disk import run, until

from xvd.errors import PeerClosed
from xvd.loglimit import LogLimit
from xvd.machine.emulated.service import EmulatedHost
from xvd.machine.xs.client import XenstoreClient
from xvd.service import supervisor
from xvd.service.supervisor import Supervisor
from xvd.service.template import Template, Worker
from xvd.types import DOM0


class NoRights:
    """`Rights` of workers that need none. lost: guests that have no disk any more. looks: how often
    all that a guest has was looked at. may_look: a look waits for it."""

    def __init__(self) -> None:
        self.lost: list[str] = []
        self.looks = 0
        self.may_look = asyncio.Event()
        self.may_look.set()

    async def equip(
        self, _worker: Worker, _guest: str, _domains: Sequence[int], _limit: LogLimit
    ) -> Callable[[], Awaitable[None]]:
        async def take_back() -> None:
            return

        return take_back

    async def suits(self, _guest: str, _domains: Sequence[int]) -> bool:
        self.looks += 1
        await self.may_look.wait()
        return True

    async def gone(self, guest: str, _domains: Sequence[int]) -> None:
        self.lost.append(guest)


A_DISK = "backend/vbd/1/51712/frontend", "/local/domain/1/device/vbd/51712"
"""The node, and its value, by which domain 1 has a disk."""


@contextlib.asynccontextmanager
async def keeping(
    template: Template, rights: NoRights
) -> AsyncIterator[tuple[Supervisor, XenstoreClient]]:
    """A supervisor of an emulated host, not started yet, and its store; closed at the end."""
    async with EmulatedHost() as host:
        machine = host.machine(DOM0)
        store = await machine.xenstore()
        keeper = Supervisor(
            store, template, ["vbd"], lambda _: {}, clear=lambda _: None, rights=rights
        )
        yield keeper, store
        await keeper.close()
        await store.close()
        machine.close()


def test_the_end_comes_at_once_while_a_worker_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("the worker of domain 1 has ended")
    monkeypatch.setattr(supervisor, "AGAIN_S", 3600.0)
    monkeypatch.setattr(supervisor, "AT_ONCE", 2)
    template = Template(end_soon)

    async def work() -> None:
        async with keeping(template, NoRights()) as (keeper, store):
            await store.write(*A_DISK)
            await keeper.start()
            await until(lambda: any(one["restarts"] for one in keeper.workers()))

    run(work(), 20)


def test_many_disks_that_come_at_once_are_looked_at_together() -> None:
    """One look takes as long as the guest has disks: one for each would take their square."""
    template, rights = Template(hang), NoRights()

    async def work() -> None:
        async with keeping(template, rights) as (keeper, store):
            await store.write(*A_DISK)
            await keeper.start()
            await until(lambda: keeper.workers() != [])
            rights.may_look.clear()
            nodes = [f"backend/vbd/1/{51712 + 16 * n}/frontend" for n in range(1, 50)]
            await asyncio.gather(*(store.write(node, A_DISK[1]) for node in nodes))
            await store.write(A_DISK[0].replace("/1/", "/2/"), A_DISK[1])
            rights.may_look.set()
            await until(lambda: len(keeper.workers()) == 2)  # all before that was seen
            assert 0 < rights.looks < 5

    run(work(), 20)


def test_an_order_of_any_size_is_whole() -> None:
    """As with settings of a thousand disks: messages between processes end at some size."""
    order = {"changes": [[f"{domain}/51712", ["max_queues=1"]] for domain in range(200_000)]}
    template = Template(send_back)

    async def work() -> None:
        worker = await template.spawn(order)
        reader, writer = await asyncio.open_connection(sock=worker.channel)
        told = int(await reader.readline())
        await worker.ended
        writer.close()
        assert told == len(order["changes"])

    try:
        run(work(), 20)
    finally:
        template.close()


def test_a_worker_may_be_asked_to_end_as_soon_as_it_is_there() -> None:
    template = Template(hang)

    async def work() -> None:
        for _ in range(20):
            worker = await template.spawn({})
            worker.signal(signal.SIGTERM)
            await worker.ended

    try:
        run(work(), 20)
    finally:
        template.close()


def send_back(order: dict[str, list[object]], channel: socket.socket) -> int:
    """Be a worker that says how much it was told."""
    channel.sendall(b"%d\n" % len(order["changes"]))
    return 0


def end_soon(_order: object, _channel: socket.socket) -> int:
    """Be a worker that ends, and not before it is known."""
    time.sleep(0.05)
    return 1


def stay(_order: object, channel: socket.socket) -> int:
    """Be a worker that does not end when it is asked to."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel.send(b"r")
    channel.recv(1)
    return 0


def hang(_order: object, _channel: socket.socket) -> int:
    """Be a worker that answers nothing."""
    signal.pause()
    return 0


def test_a_guest_that_is_back_before_its_worker_has_ended_is_not_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "LINGER_S", 0.0)
    template, rights = Template(stay), NoRights()

    async def work() -> None:
        async with keeping(template, rights) as (keeper, store):
            await store.write(*A_DISK)
            await keeper.start()
            await until(lambda: keeper.workers() != [])
            first = await keeper.worker_of("1")
            await asyncio.get_running_loop().sock_recv(first.channel, 1)  # it is ready
            served = keeper._guests["1"].task
            assert served is not None
            await store.rm("backend/vbd/1")
            await until(lambda: keeper.workers() == [])
            await store.write(*A_DISK)
            await until(lambda: keeper.workers() != [])
            second = await keeper.worker_of("1")
            assert second.pid != first.pid
            first.signal(signal.SIGKILL)
            await served
            assert await keeper.worker_of("1") is second
            assert rights.lost == []
            monkeypatch.setattr(supervisor, "END_S", 0.0)

    run(work(), 20)


def test_a_worker_that_hangs_is_killed_and_followed_by_another(
    monkeypatch: pytest.MonkeyPatch, expect_log: Callable[[str], None]
) -> None:
    expect_log("the worker of domain 1 does not answer, and is killed")
    expect_log("the worker of domain 1 has ended")
    monkeypatch.setattr(supervisor, "PING_S", 0.0)
    monkeypatch.setattr(supervisor, "PONG_S", 0.01)
    monkeypatch.setattr(supervisor, "END_S", 0.0)
    template = Template(hang)

    async def work() -> None:
        async with keeping(template, NoRights()) as (keeper, store):
            await store.write(*A_DISK)
            await keeper.start()
            await until(lambda: any(one["restarts"] for one in keeper.workers()))

    run(work(), 20)


class Outgrown(NoRights):
    """What a worker has is not enough any more once it is outgrown."""

    outgrown = False

    async def suits(self, _guest: str, _domains: Sequence[int]) -> bool:
        return not self.outgrown


def test_a_worker_that_lingers_is_exchanged_for_a_disk_that_needs_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "END_S", 0.0)
    template, rights = Template(hang), Outgrown()

    async def work() -> None:
        async with keeping(template, rights) as (keeper, store):
            await store.write(*A_DISK)
            await keeper.start()
            await until(lambda: keeper.workers() != [])
            worker = await keeper.worker_of("1")
            await store.rm("backend/vbd/1")
            await until(lambda: keeper.workers()[0]["domains"] == [])
            rights.outgrown = True
            await store.write(*A_DISK)
            await worker.ended

    run(work(), 20)


class Slow(Outgrown):
    """It is outgrown while the first worker is being given what it has."""

    equipped = 0

    async def equip(
        self, worker: Worker, guest: str, domains: Sequence[int], limit: LogLimit
    ) -> Callable[[], Awaitable[None]]:
        self.equipped += 1
        if self.equipped == 1:
            self.outgrown = True
            looks = self.looks
            await until(lambda: self.looks > looks)
            self.outgrown = False
        return await super().equip(worker, guest, domains, limit)

    async def suits(self, guest: str, domains: Sequence[int]) -> bool:
        self.looks += 1
        return await super().suits(guest, domains)


def test_a_worker_is_exchanged_for_a_disk_that_came_while_it_was_being_equipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "END_S", 0.0)
    template, rights = Template(hang), Slow()

    async def work() -> None:
        async with keeping(template, rights) as (keeper, store):
            await store.write(*A_DISK)
            await keeper.start()
            await until(lambda: rights.equipped == 1)
            await store.write(*A_DISK)
            await until(lambda: rights.equipped == 2)

    run(work(), 20)


def test_a_domain_that_is_being_destroyed_is_still_the_same_guest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """libxl may have removed its name for a guest while its disks are still being told of."""
    monkeypatch.setattr(supervisor, "END_S", 0.0)
    template, rights = Template(hang), NoRights()
    vm = "/local/domain/1/vm", "/vm/one"

    async def work() -> None:
        async with keeping(template, rights) as (keeper, store):
            await store.write(*vm)
            await store.write(*A_DISK)
            await keeper.start()
            await until(lambda: keeper.workers() != [])
            worker = await keeper.worker_of("/vm/one")
            looks = rights.looks
            await store.rm(vm[0])
            await store.write(*A_DISK)
            await until(lambda: rights.looks > looks)
            assert [one["guest"] for one in keeper.workers()] == ["/vm/one"]
            assert await keeper.worker_of("/vm/one") is worker

    run(work(), 20)


@pytest.mark.parametrize(("workers", "seconds"), [(1, 10), (100, 10), (200, 20), (2000, 60)])
def test_many_workers_are_asked_more_rarely(workers: int, seconds: float) -> None:
    assert supervisor.ping_pause_s(workers) == seconds


def test_directories_of_errors_go_when_they_are_empty() -> None:
    template = Template(lambda _order, _channel: 0)

    async def work() -> None:
        async with keeping(template, NoRights()) as (keeper, store):
            await keeper.start()
            await store.write("error/backend/vbd/1/51712/error", "it failed")
            await store.rm("error/backend/vbd/1")
            while await store.exists("error"):
                pass

    run(work(), 20)


def test_a_worker_that_has_ended_at_once_does_not_end_the_template(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = os.pidfd_open

    def open_late(pid: int) -> int:
        while os.path.exists(f"/proc/{pid}"):
            time.sleep(0)
        return opened(pid)

    monkeypatch.setattr(os, "pidfd_open", open_late)
    template = Template(lambda _order, _channel: 0)
    monkeypatch.undo()

    async def work() -> None:
        for _ in range(2):
            with pytest.raises(ProcessLookupError):
                await template.spawn({})

    try:
        run(work(), 20)
    finally:
        template.close()


def test_a_template_that_was_killed_forks_nobody() -> None:
    template = Template(lambda _order, _channel: 0)

    async def work() -> None:
        os.kill(template.pid, 9)
        await template.wait()
        with pytest.raises((PeerClosed, OSError)):
            await template.spawn({})

    try:
        run(work(), 20)
    finally:
        template.close()
