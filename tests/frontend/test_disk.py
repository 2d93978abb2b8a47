# SPDX-License-Identifier: Apache-2.0
"""A disk as its user sees it, on a whole emulated machine."""

import asyncio
import errno
import os
import random
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rig_disk import disk_world, opener, run, until
from rig_engines import PythonEngine, image

from xvd.backend.device import Settings
from xvd.engines.checked import Checked
from xvd.engines.interface import EngineInfo
from xvd.engines.memory import MemoryEngine
from xvd.frontend.disk import Disk
from xvd.frontend.load import Job, run_load
from xvd.frontend.sync import SyncDisk
from xvd.toolstack.vbd import detach


@pytest.mark.parametrize("copying", [False, True], ids=["map", "copy"])
@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 512),
        (0, 1),
        (511, 2),
        (1, 45055),
        (4096, 45056),
        (100, 45057),
        (12345, 1 << 20),
        (8191, 1),
    ],
)
def test_what_is_written_is_read(copying: bool, offset: int, length: int) -> None:
    async def work() -> None:
        async with disk_world(settings=Settings(copying=copying)) as world:
            async with await world.disk() as disk:
                data = random.Random(offset).randbytes(length)
                await disk.write(offset, data)
                assert await disk.read(offset, length) == data
                before, after = await disk.read(0, offset), await disk.read(offset + length, 512)
                assert not any(before)
                assert not any(after)

    run(work())


def test_a_disk_says_what_it_is() -> None:
    async def work() -> None:
        async with disk_world() as world, await world.disk("memory:8M") as disk:
            assert (disk.size, disk.logical_block_size, disk.read_only) == (8 << 20, 512, False)
            assert (disk.can_flush, disk.can_discard) == (True, True)
            assert disk.counters().requests == 0

    run(work())


def test_unaligned_writes_to_one_sector_lose_nothing() -> None:
    async def work() -> None:
        async with disk_world() as world, await world.disk() as disk:
            await asyncio.gather(*(disk.write(i * 7, bytes([i]) * 7) for i in range(73)))
            assert await disk.read(0, 511) == b"".join(bytes([i]) * 7 for i in range(73))

    run(work())


def test_unaligned_writes_among_aligned_ones_lose_nothing() -> None:
    async def work() -> None:
        async with disk_world() as world, await world.disk() as disk:
            aligned = [disk.write(i * 1024, b"a" * 512) for i in range(32)]
            edges = [disk.write(i * 1024 + 500, b"e" * 24) for i in range(32)]
            await asyncio.gather(*(x for pair in zip(aligned, edges, strict=True) for x in pair))
            for i in range(32):
                assert await disk.read(i * 1024 + 500, 24) == b"e" * 24
                assert await disk.read(i * 1024, 500) == b"a" * 500

    run(work())


def test_empty_operations_do_nothing() -> None:
    async def work() -> None:
        async with disk_world() as world, await world.disk() as disk:
            await disk.write(100, b"")
            assert await disk.read(100, 0) == b""
            await disk.discard(100, 0)
            await disk.discard(100, 600)  # no whole block within
            assert disk.counters().requests == 0

    run(work())


def test_a_memoryview_counts_in_bytes() -> None:
    async def work() -> None:
        async with disk_world() as world, await world.disk() as disk:
            await disk.write(0, memoryview(b"abcd" * 256).cast("I"))
            assert await disk.read(0, 1024) == b"abcd" * 256

    run(work())


@pytest.mark.parametrize(
    "call",
    [lambda d: d.read(8 << 20, 1), lambda d: d.read(-1, 1), lambda d: d.write((8 << 20) - 1, b"xx"),
     lambda d: d.discard(0, (8 << 20) + 1), lambda d: d.read(0, -1)],
)  # fmt: skip
def test_what_is_not_on_the_disk(call: Callable[[Disk], Awaitable[object]]) -> None:
    async def work() -> None:
        async with disk_world() as world, await world.disk() as disk:
            with pytest.raises(OSError, match="are not on a disk of 8388608 bytes") as caught:
                await call(disk)
            assert caught.value.errno == errno.EINVAL

    run(work())


def test_a_read_only_disk() -> None:
    async def work() -> None:
        async with disk_world() as world, await world.disk(access="r") as disk:
            assert disk.read_only
            for call in (disk.write(0, b"x"), disk.discard(0, 512)):
                with pytest.raises(OSError, match="read-only") as caught:
                    await call
                assert caught.value.errno == errno.EROFS
            await disk.flush()
            assert await disk.read(0, 10) == bytes(10)

    run(work())


@pytest.mark.parametrize(
    ("kind", "number"),
    [("EIO", errno.EIO), ("ENOSPC", errno.EIO), ("EOPNOTSUPP", errno.EOPNOTSUPP)],
)
def test_failing_storage(kind: str, number: int, expect_log) -> None:
    expect_log("storage fails: ")

    async def work() -> None:
        async with disk_world(f"error:on=write,one_in=1,errno={kind}") as world:
            async with await world.disk() as disk:
                for _ in range(5):
                    with pytest.raises(OSError, match="WRITE of 1 sectors at 0") as caught:
                        await disk.write(0, bytes(512))
                    assert caught.value.errno == number
                assert await disk.read(0, 512) == bytes(512)
                await disk.flush()

    if kind == "EOPNOTSUPP":
        expect_log.expected.clear()
    run(work())
    assert len(expect_log.lines) <= 1


def test_a_full_file_system_is_an_io_error_and_one_line_with_the_remedy(
    tmp_path: Path, expect_log
) -> None:
    expect_log("No space left on device.*the guest sees I/O errors: free some space where the")

    async def work() -> None:
        async with disk_world("error:on=write,one_in=1,errno=ENOSPC") as world:
            async with await world.disk(str(image(tmp_path))) as disk:
                outcomes = await asyncio.gather(
                    *(disk.write(i * 512, bytes(512)) for i in range(50)), return_exceptions=True
                )
                assert {getattr(outcome, "errno", 0) for outcome in outcomes} == {errno.EIO}
                await until(lambda: bool(expect_log.lines))

    run(work())
    assert len(expect_log.lines) == 1


class NoFlush(PythonEngine):
    """Offers flush, and then does not do it."""

    def flush(self) -> None:
        raise OSError(errno.EOPNOTSUPP, "not any more")


def test_a_backend_that_withdraws_flush(expect_log) -> None:
    expect_log("the backend has withdrawn flush")
    expect_log("the backend has withdrawn barriers")

    async def open_storage(_: object) -> Checked:
        return Checked(NoFlush(1 << 20))

    async def work() -> None:
        async with disk_world(open_storage=open_storage) as world, await world.disk() as disk:
            assert disk.can_flush
            await disk.flush()
            assert not disk.can_flush
            await disk.flush()
            assert disk.counters().requests == 2  # the other was an empty barrier

    run(work())
    assert len(expect_log.lines) == 2


class Blocks4K(PythonEngine):
    @property
    def info(self) -> EngineInfo:
        return EngineInfo(size=1 << 20, logical_block_size=4096, can_flush=False)


def test_a_disk_of_4096_byte_blocks_takes_any_offset() -> None:
    async def open_storage(_: object) -> Checked:
        return Checked(Blocks4K(1 << 20))

    async def work() -> None:
        async with disk_world(open_storage=open_storage) as world, await world.disk() as disk:
            await disk.write(5000, b"x" * 5000)
            assert await disk.read(4999, 5002) == b"\0" + b"x" * 5000 + b"\0"
            assert (disk.can_flush, disk.can_discard) == (False, False)
            await disk.flush()
            with pytest.raises(OSError, match="does not offer discard") as caught:
                await disk.discard(0, 4096)
            assert caught.value.errno == errno.EOPNOTSUPP

    run(work())


def test_no_discard_when_the_toolstack_forbids_it() -> None:
    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach()
            async with await world.open(vbd) as disk:
                assert disk.can_discard

    run(work())


def test_a_load_measures_and_leaves_the_disk_as_it_was() -> None:
    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach()
            machine, store = await world.guest()
            told: list[str] = []
            for _ in range(2):
                job = Job(depth=8, span=8 << 20, operations=200, write_percent=50)
                result = await run_load(
                    machine,
                    store,
                    f"device/vbd/{vbd.vdev}",
                    job,
                    on_start=lambda: told.append("start"),
                    on_end=lambda: told.append("end"),
                )
                assert (result.operations, result.errors) == (200, 0)
            assert told == ["start", "end"] * 2

    run(work())


@pytest.mark.parametrize("sequential", [False, True])
def test_a_verifying_load_finds_what_another_has_changed(sequential: bool) -> None:
    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach()
            machine, store = await world.guest()
            path = f"device/vbd/{vbd.vdev}"
            fill = Job(
                span=1 << 20, operations=256, write_percent=100, sequential=True, verify=True
            )
            assert (await run_load(machine, store, path, fill)).errors == 0
            job = replace(fill, write_percent=50, sequential=sequential)
            assert (await run_load(machine, store, path, job)).errors == 0
            async with await world.open(vbd) as disk:
                await disk.write(4096 * 5 + 3, b"x")
            reads = replace(fill, write_percent=0)
            assert (await run_load(machine, store, path, reads)).errors == 1

    run(work())


def test_a_disk_that_is_not_there() -> None:
    async def work() -> None:
        async with disk_world() as world:
            machine, store = await world.guest()
            with pytest.raises(Exception, match="backend"):
                await Disk.open(machine, store, "device/vbd/51712")

    run(work())


def test_a_closed_disk_refuses() -> None:
    async def work() -> None:
        async with disk_world() as world:
            disk = await world.disk()
            await disk.close()
            await disk.close()
            with pytest.raises(OSError, match="the disk is gone") as caught:
                await disk.read(0, 1)
            assert caught.value.errno == errno.ENODEV

    run(work())


@pytest.mark.beyond_xen("processes")
def test_threads_share_a_blocking_disk() -> None:
    """The same disk for code without an event loop; its own loop leaves nothing behind."""
    from rig_machine import HostThread

    from xvd.backend.server import Server
    from xvd.toolstack.vbd import attach, create_guest
    from xvd.toolstack.xldisk import parse_xl_disk
    from xvd.types import Domid

    served = HostThread()

    async def start() -> tuple[Server, object]:
        dom0 = served.service.machine(Domid(0))
        store = await dom0.xenstore()
        server = Server(dom0, store, opener())
        await server.start()
        await create_guest(store, Domid(1), "guest")
        await attach(store, Domid(1), parse_xl_disk("vdev=xvda,target=memory:8M"))
        return server, store

    def call(work):
        return asyncio.run_coroutine_threadsafe(work, served._loop).result(10)

    server, store = call(start())
    machine = served.machine(Domid(1))

    async def connect() -> Disk:
        return await Disk.open(machine, await machine.xenstore(), "device/vbd/51712")

    before = threading.active_count()
    with SyncDisk(connect) as disk:
        disk.write(5, b"hello")
        disk.flush()
        disk.discard(4096, 4096)
        found = []
        threads = [threading.Thread(target=lambda: found.append(disk.read(5, 5))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with pytest.raises(OSError, match="not on a disk"):
            disk.read(disk.size, 1)
    disk.close()
    assert found == [b"hello"] * 4
    assert threading.active_count() <= before
    machine.close()
    call(server.close())
    call(store.close())
    served.close()


@pytest.mark.beyond_xen("speed")
def test_fifty_connections_leave_nothing_behind() -> None:
    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach()
            await (await world.open(vbd)).close()
            idle = world.host.host.accounting()
            descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
            for turn in range(50):
                async with await world.open(vbd) as disk:
                    await disk.write(turn * 512, bytes([turn]) * 512)
            assert world.host.host.accounting() == idle
            assert threading.active_count() <= threads + 1
            assert len(os.listdir("/proc/self/fd")) <= descriptors + 2

    run(work())


def test_two_guests_and_three_disks_do_not_meet() -> None:
    async def work() -> None:
        async with disk_world() as world:
            disks = [
                await world.disk(domid=1, vdev="xvda"), await world.disk(domid=1, vdev="xvdb"),
                await world.disk(domid=2, vdev="xvda"),
            ]  # fmt: skip
            await asyncio.gather(*(d.write(0, bytes([i]) * 100000) for i, d in enumerate(disks)))
            for i, disk in enumerate(disks):
                assert await disk.read(0, 100000) == bytes([i]) * 100000
                await disk.close()

    run(work())


def test_hot_unplug_during_io_ends_every_operation() -> None:
    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach()
            disk = await world.open(vbd)
            writes = [asyncio.ensure_future(disk.write(i * 4096, bytes(4096))) for i in range(500)]
            await detach(world.store, vbd)
            outcomes = await asyncio.gather(*writes, return_exceptions=True)
            assert {getattr(outcome, "errno", 0) for outcome in outcomes} <= {0, errno.ENODEV}
            with pytest.raises(OSError, match=r"the disk is gone: .*removed"):
                await disk.read(0, 512)
            await disk.close()
            assert await world.store.try_read(vbd.backend) is None

    run(work())


def test_a_frontend_that_was_abandoned_is_led_round_by_its_successor() -> None:
    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach()
            first = await world.open(vbd)
            await first.write(0, b"kept")
            await first._leave(abandon=True)
            async with await world.open(vbd) as second:
                assert await second.read(0, 4) == b"kept"

    run(work())


def test_a_new_backend_takes_over_under_load(tmp_path: Path) -> None:
    """Nothing is lost and nothing fails: the caller sees a delay."""
    path = str(image(tmp_path, 1 << 20))

    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach(path)
            disk = await world.open(vbd)
            done = 0

            async def writer(number: int) -> None:
                nonlocal done
                for turn in range(20):
                    await disk.write((number * 20 + turn) * 512, bytes([number + 1]) * 512)
                    done += 1

            writers = [asyncio.ensure_future(writer(number)) for number in range(8)]
            for wanted in (20, 60, 100):
                await until(lambda wanted=wanted: done >= wanted)  # type: ignore[misc]
                assert world.server is not None
                await world.server.close()
                await world.serve(opener())
            await asyncio.gather(*writers)
            for number in range(8):
                assert await disk.read(number * 20 * 512, 20 * 512) == bytes([number + 1]) * 10240
            assert disk.connections == 1
            await disk.close()

    run(work())


def test_requests_wait_for_a_backend_that_is_away(tmp_path: Path) -> None:
    path = str(image(tmp_path))

    async def work() -> None:
        async with disk_world() as world:
            disk = await world.disk(path)
            assert world.server is not None
            await world.server.close()
            waiting = asyncio.ensure_future(disk.write(0, b"w" * 100000))
            await asyncio.sleep(0)
            assert not waiting.done()
            await world.serve(opener())
            await waiting
            assert await disk.read(0, 100000) == b"w" * 100000
            await disk.close()

    run(work())


def test_engines_are_closed_with_their_disks() -> None:
    engines: list[PythonEngine] = []

    async def open_storage(_: object) -> Checked:
        engines.append(PythonEngine(1 << 20))
        return Checked(engines[-1])

    async def work() -> None:
        async with disk_world(open_storage=open_storage) as world:
            for _ in range(10):
                vbd = await world.attach()
                await (await world.open(vbd)).close()
                await detach(world.store, vbd)

    run(work())
    assert {engine.closed for engine in engines} == {1}
    assert MemoryEngine(512).info.size == 512
