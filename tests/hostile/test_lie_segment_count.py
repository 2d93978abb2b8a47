# SPDX-License-Identifier: Apache-2.0
"""A slot that claims segments it has no room for, or none where data is needed."""

import pytest
from rig_queue import QueueWorld, rq

from xvd.blkif.abi import Abi, Op, Status
from xvd.blkif.messages import pack_request

ABIS = pytest.mark.parametrize("abi", list(Abi), ids=lambda abi: abi.name)


@ABIS
@pytest.mark.parametrize("claimed", [12, 13, 32, 128, 255])
@pytest.mark.parametrize("operation", [Op.READ, Op.WRITE, Op.FLUSH_DISKCACHE])
def test_more_segments_than_eleven(abi: Abi, claimed: int, operation: Op) -> None:
    with QueueWorld(abi=abi) as world:
        slot = bytearray(pack_request(abi, rq(operation, 0, *[world.segment(0)] * 11)))
        slot[1] = claimed
        world.refused(bytes(slot), "too_many_segments", Status.ERROR)


@pytest.mark.parametrize("operation", [Op.READ, Op.WRITE])
def test_no_segments_where_there_must_be_data(operation: Op) -> None:
    with QueueWorld() as world:
        world.refused(rq(operation), "no_segments", Status.ERROR)
