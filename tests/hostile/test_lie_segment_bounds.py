# SPDX-License-Identifier: Apache-2.0
"""Segments that end before they begin, or beyond their page."""

import pytest
from rig_queue import QueueWorld, rq

from xvd.blkif.abi import Op, Status

MODES = pytest.mark.parametrize("copying", [False, True], ids=["map", "copy"])


@MODES
@pytest.mark.parametrize(("first", "last"), [(1, 0), (7, 6), (255, 0), (255, 254), (9, 8)])
def test_a_first_sector_after_the_last(copying: bool, first: int, last: int) -> None:
    with QueueWorld(copying=copying) as world:
        request = rq(Op.READ, 0, world.segment(0), world.segment(1, first, last))
        world.refused(request, "segment_order", Status.ERROR)


@MODES
@pytest.mark.parametrize(("first", "last"), [(0, 8), (7, 8), (0, 255), (255, 255), (8, 8)])
def test_a_last_sector_past_the_page(copying: bool, first: int, last: int) -> None:
    with QueueWorld(copying=copying) as world:
        request = rq(Op.WRITE, 0, world.segment(0), world.segment(1, first, last))
        world.refused(request, "segment_past_page", Status.ERROR)
