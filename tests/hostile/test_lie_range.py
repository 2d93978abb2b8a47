# SPDX-License-Identifier: Apache-2.0
"""Requests outside the disk, by one sector or by a sum that wraps."""

import pytest
from rig_queue import QueueWorld, discard, rq

from xvd.blkif.abi import Op, Status

MAX = 2**64 - 1
DISK = 2048  # sectors of 1 MiB


@pytest.mark.parametrize("operation", [Op.READ, Op.WRITE, Op.FLUSH_DISKCACHE])
@pytest.mark.parametrize("sector", [DISK, DISK - 7, 2**32, 2**55, 2**63, MAX - 7, MAX - 6, MAX])
def test_data_past_the_end(operation: Op, sector: int) -> None:
    with QueueWorld() as world:
        world.refused(rq(operation, sector, world.segment(0)), "out_of_range", Status.ERROR)


@pytest.mark.parametrize(
    ("sector", "sectors"),
    [(0, DISK + 1), (DISK, 1), (1, MAX), (MAX, 1), (MAX, MAX), (2**63, 2**63), (8, 2**64 - 8)],
)
def test_a_discard_past_the_end(sector: int, sectors: int) -> None:
    with QueueWorld() as world:
        world.refused(discard(sector, sectors), "out_of_range", Status.ERROR)


@pytest.mark.parametrize("sector", [1, 7, 9])
def test_a_start_inside_a_logical_block(sector: int) -> None:
    with QueueWorld(block_sectors=8) as world:
        world.refused(rq(Op.READ, sector, world.segment(0)), "misaligned", Status.ERROR)


def test_a_length_that_is_no_logical_block() -> None:
    with QueueWorld(block_sectors=8) as world:
        world.refused(rq(Op.WRITE, 8, world.segment(0, 0, 3)), "misaligned", Status.ERROR)
