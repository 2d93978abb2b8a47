# SPDX-License-Identifier: Apache-2.0
"""Images of a Ceph cluster, by a real one."""

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ceph import POOL, Cluster, running_cluster
from rig_disk import disk_world, run
from standstill import standing_still

from xvd.engines.info import SnapshotAction
from xvd.engines.uri import open_engine
from xvd.errors import EngineError
from xvd.frontend.settings import Settings as FrontSettings

pytestmark = [pytest.mark.slow, pytest.mark.tools]

SIZE, BLOCK = 32 << 20, 4096


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, requires_tool: Callable[[str], str]
) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("rbd") / "ceph", requires_tool) as cluster:
        yield cluster


def test_what_a_guest_wrote_is_in_the_image(cluster: Cluster, tmp_path: Path) -> None:
    uri, copy = cluster.image("written", SIZE), tmp_path / "copy"
    content = bytearray(SIZE)
    draw = random.Random(1)

    async def work() -> None:
        front = FrontSettings(max_queues=2)
        async with disk_world() as world, await world.disk(uri, front=front) as disk:

            async def write(at: int, data: bytes) -> None:
                await disk.write(at, data)
                content[at : at + len(data)] = data

            for _ in range(20):
                blocks = draw.sample(range(SIZE // 65536), 16)
                sizes = [draw.choice((512, 4096, 65536)) for _ in blocks]
                await asyncio.gather(
                    *(
                        write(block * 65536, draw.randbytes(size))
                        for block, size in zip(blocks, sizes, strict=True)
                    )
                )
            await disk.discard(4 << 20, 4 << 20)
            content[4 << 20 : 8 << 20] = bytes(4 << 20)
            await disk.flush()
            assert await disk.read(0, SIZE) == content

    run(work())

    cluster.run("rbd", "export", f"{POOL}/written", str(copy))
    assert copy.read_bytes() == content


@pytest.mark.parametrize(("layer", "objects"), [("", 16), ("detect-zeroes|", 0)])
def test_zeros_take_no_space(cluster: Cluster, layer: str, objects: int) -> None:
    name, size = f"zeros-{objects}", 1 << 20
    uri = cluster.image(name, size, "--object-size", "64K")
    engine = open_engine(uri)
    engine.write(memoryview(b"d" * size), 0)
    engine.close()

    async def work() -> None:
        async with disk_world() as world, await world.disk(layer + uri) as disk:
            await disk.write(0, bytes(size))
            await disk.flush()
            assert await disk.read(0, size) == bytes(size)

    run(work())

    image = json.loads(cluster.run("rbd", "info", "--format=json", f"{POOL}/{name}"))
    found = cluster.run("rados", "-p", POOL, "ls").split()
    assert sum(one.startswith(image["block_name_prefix"] + ".") for one in found) == objects


def test_a_cluster_that_is_away_is_a_delay(cluster: Cluster) -> None:
    uri = cluster.image("away", SIZE)

    async def work() -> None:
        async with disk_world() as world, await world.disk(uri) as disk:
            await disk.write(0, b"1" * BLOCK)
            with standing_still(cluster.osd):
                writing = asyncio.ensure_future(disk.write(0, b"2" * BLOCK))
                done, _ = await asyncio.wait([writing], timeout=1.0)
                assert not done
            await writing
            assert await disk.read(0, BLOCK) == b"2" * BLOCK

    run(work())


def test_a_disk_moves_to_the_cluster_while_it_is_written_to(
    cluster: Cluster, tmp_path: Path
) -> None:
    uri, one = cluster.image("moved", SIZE), tmp_path / "a"
    one.write_bytes(random.Random(2).randbytes(SIZE))

    async def work() -> None:
        async with disk_world() as world, await world.disk(str(one)) as disk:
            assert world.server is not None
            copies = world.server.device("1/51712").copies
            await copies.mirror(uri)
            while copies.job is not None and copies.job.phase != "ready":
                await disk.write(random.randrange(SIZE // BLOCK) * BLOCK, b"w" * BLOCK)
            await copies.pivot()
            assert await disk.read(0, SIZE) == one.read_bytes()

    run(work())


def test_one_writer_at_a_time_and_any_number_of_snapshots_readers(cluster: Cluster) -> None:
    uri = cluster.image("locked", SIZE)
    snapshot = uri.replace("locked", "locked@then")
    engine = open_engine(uri)
    try:
        engine.write(memoryview(b"1" * BLOCK), 0)
        engine.snapshot(SnapshotAction.CREATE, "then")
        engine.write(memoryview(b"2" * BLOCK), 0)
        with pytest.raises(EngineError, match="is in use"):
            open_engine(uri)
        before = open_engine(snapshot)
        read = bytearray(BLOCK)
        before.read(memoryview(read), 0)
        before.close()
        names = [one.name for one in engine.snapshots()]
        engine.snapshot(SnapshotAction.REVERT, "then")
        back = bytearray(BLOCK)
        engine.read(memoryview(back), 0)
        engine.snapshot(SnapshotAction.DELETE, "then")
    finally:
        engine.close()

    assert (bytes(read), bytes(back), names) == (b"1" * BLOCK, b"1" * BLOCK, ["then"])
    assert before.info.read_only


def test_it_is_resized_by_us_and_by_others(cluster: Cluster) -> None:
    uri = cluster.image("resized", SIZE)
    engine = open_engine(uri)
    try:
        engine.resize(2 * SIZE)
        ours = engine.measure()
        cluster.run("rbd", "resize", "--size", f"{3 * SIZE}B", f"{POOL}/resized")
        theirs = engine.measure()
        identity = engine.identity
    finally:
        engine.close()

    assert (ours, theirs) == (2 * SIZE, 3 * SIZE)
    assert identity.endswith(cluster.run("ceph", "fsid").strip())


def test_an_image_that_is_not_there(cluster: Cluster) -> None:
    with pytest.raises(EngineError, match=r"rbd:rbd/lost: No such file"):
        open_engine(f"rbd:{POOL}/lost,conf={cluster.conf}")
    with pytest.raises(EngineError, match="pool lost: No such file"):
        open_engine(f"rbd:lost/image,conf={cluster.conf}")
