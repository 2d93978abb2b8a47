# SPDX-License-Identifier: Apache-2.0
"""Writes that do not begin or end on a block: what else is in the block is not lost."""

import asyncio
from collections.abc import Callable

import pytest
from served_disk import emulated_disk


@pytest.mark.slow
def test_a_write_that_is_cancelled_keeps_its_blocks_until_it_is_over() -> None:
    """An unaligned write is a read, a change and a write of whole blocks. When its caller gave up
    (a timeout) after the last part was on the ring, the next writer of the block was let in, and
    whichever of the two the storage finished last stayed."""

    async def scenario() -> int:
        async with emulated_disk("memory:1M", layers=["delay:write=1s"]) as disk:
            given_up = asyncio.create_task(disk.write(100, b"a"))
            while disk.counters().requests < 2:  # noqa: ASYNC110 - no bell rings for it
                await asyncio.sleep(0)
            given_up.cancel()
            await asyncio.wait([given_up])
            following = asyncio.create_task(disk.write(0, bytes(512)))
            await asyncio.wait([following], timeout=0.05)  # enough for the ring, were it let
            on_ring = disk.counters().requests
            await following
            return on_ring

    assert asyncio.run(scenario()) == 2


def test_neighbours_in_one_block_are_both_kept() -> None:
    async def scenario() -> bytearray:
        async with emulated_disk("memory:1M") as disk:
            await asyncio.gather(*(disk.write(n, bytes([n])) for n in range(256)))
            return await disk.read(0, 256)

    assert asyncio.run(scenario()) == bytes(range(256))


def test_whole_blocks_and_parts_of_them_at_once() -> None:
    async def scenario() -> bytearray:
        async with emulated_disk("memory:1M") as disk:
            await asyncio.gather(
                disk.write(512, b"\x11" * 512), disk.write(500, b"\x22" * 12),
                disk.write(1024, b"\x33" * 5), disk.write(2048, b"\x44" * 512),
            )  # fmt: skip
            return await disk.read(500, 2048)

    expected = b"\x22" * 12 + b"\x11" * 512 + b"\x33" * 5 + bytes(1019) + b"\x44" * 500
    assert asyncio.run(scenario()) == expected


def test_a_failed_write_lets_the_next_one_in(expect_log: Callable[[str], None]) -> None:
    expect_log("storage fails")

    async def scenario() -> list[object]:
        async with emulated_disk("memory:1M", layers=["error:on=read,one_in=1"]) as disk:
            writes = (disk.write(100, b"a"), disk.write(200, b"b"), disk.write(0, bytes(512)))
            return await asyncio.gather(*writes, return_exceptions=True)

    first, second, third = asyncio.run(scenario())
    assert isinstance(first, OSError)
    assert isinstance(second, OSError)
    assert third is None
