# SPDX-License-Identifier: Apache-2.0
"""A disk of a guest that is there already: joined with an event loop, and without one."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from xvd import ConfigError, Disk, EmulatedHost, SyncDisk, XvdError
from xvd.backend.server import Server
from xvd.blkif.assignment import BackendAssignment
from xvd.engines.interface import Engine
from xvd.engines.uri import open_engine
from xvd.errors import DiskInUse, GrantError, PeerClosed
from xvd.frontend.settings import Settings
from xvd.machine.xen.here import available
from xvd.toolstack.vbd import attach, create_guest
from xvd.toolstack.xldisk import XlDisk
from xvd.types import DOM0, Domid

SIZE = 1 << 20


@asynccontextmanager
async def host_with_a_disk(directory: Path) -> AsyncIterator[EmulatedHost]:
    """As ``xvd host``, ``xvd backend`` and ``xvd attach 1 vdev=xvda,target=memory:1M``."""

    async def storage(_: BackendAssignment) -> Engine:
        return open_engine("memory:1M")

    async with EmulatedHost() as host:
        await host.listen(directory)
        host.create_domain(Domid(1))
        machine = host.machine(DOM0)
        async with await machine.xenstore() as store:
            await create_guest(store, Domid(1), "guest")
            backend = Server(machine, store, storage)
            await backend.start()
            await attach(store, Domid(1), XlDisk(target="memory:1M", vdev="xvda"))
            try:
                yield host
            finally:
                await backend.close()


def taken(host: EmulatedHost) -> dict[str, int]:
    """What is taken by others than the host's own."""
    return {name: count for name, count in host.host.accounting().items() if name != "sessions"}


NOTHING = {"pins": 0, "mappings": 0, "ports": 0, "pages": 0}


def test_a_disk_is_joined_for_a_block(tmp_path: Path) -> None:
    async def work() -> None:
        async with host_with_a_disk(tmp_path) as host:
            async with Disk.connect(tmp_path, domid=1, vdev="xvda") as disk:
                await disk.write(5, b"hello")
                assert (disk.size, await disk.read(4, 7)) == (SIZE, b"\0hello\0")
            assert taken(host) == NOTHING

    asyncio.run(work())


def test_a_disk_is_joined_by_its_number_until_it_is_closed(tmp_path: Path) -> None:
    async def work() -> None:
        async with host_with_a_disk(tmp_path) as host:
            front = Settings(max_queues=1)
            disk = await Disk.connect(str(tmp_path), domid=1, vdev=51712, settings=front)
            await disk.close()
            await disk.close()
            assert taken(host) == NOTHING

    asyncio.run(work())


def test_a_disk_is_joined_without_an_event_loop(tmp_path: Path) -> None:
    def use() -> bytes:
        with SyncDisk.connect(tmp_path, domid=1, vdev="xvda") as disk:
            assert isinstance(disk.disk, Disk)
            disk.write(5, b"hello")
            return bytes(disk.read(5, 5))

    async def work() -> None:
        async with host_with_a_disk(tmp_path) as host:
            assert await asyncio.to_thread(use) == b"hello"
            assert taken(host) == NOTHING

    asyncio.run(work())


@pytest.mark.parametrize(
    ("domid", "vdev", "kind", "text"),
    [
        (1, "xvdb", ConfigError, "1/xvdb: there is no such disk; attach it first"),
        (1, "floppy", ConfigError, "'floppy' names no virtual device"),
        (7, "xvda", GrantError, "there is no domain 7"),
    ],
)
def test_a_disk_that_is_not_there_is_said_to_be(
    tmp_path: Path, domid: int, vdev: str, kind: type[XvdError], text: str
) -> None:
    async def work() -> None:
        async with host_with_a_disk(tmp_path) as host:
            with pytest.raises(kind, match=text):
                await Disk.connect(tmp_path, domid=domid, vdev=vdev)
            assert taken(host) == NOTHING

    asyncio.run(work())


def test_a_disk_has_one_frontend(tmp_path: Path) -> None:
    async def work() -> None:
        async with host_with_a_disk(tmp_path):
            async with Disk.connect(tmp_path, domid=1, vdev="xvda"):
                with pytest.raises(DiskInUse):
                    await Disk.connect(tmp_path, domid=1, vdev="xvda")

    asyncio.run(work())


def test_a_directory_without_a_host_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(PeerClosed, match=r"no host answers .* start one: xvd host DIR"):
        SyncDisk.connect(tmp_path, domid=1, vdev="xvda")


@pytest.mark.skipif(available(), reason="this is a Xen domain")
def test_without_xen_a_host_has_to_be_named() -> None:
    with pytest.raises(ConfigError, match="no Xen here; name the directory of an emulated host"):
        SyncDisk.connect(vdev="xvda")


def test_a_disk_whose_guest_has_ended_can_be_left(tmp_path: Path) -> None:
    async def work() -> None:
        async with host_with_a_disk(tmp_path) as host:
            disk = await Disk.connect(tmp_path, domid=1, vdev="xvda")
            host.destroy_domain(Domid(1))
            await disk.close(timeout_s=0)

    asyncio.run(work())
