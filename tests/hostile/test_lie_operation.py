# SPDX-License-Identifier: Apache-2.0
"""Operations that blkif does not have, or that this backend did not offer."""

import pytest
from rig_queue import QueueWorld, discard, rq

from xvd.blkif.abi import Abi, Op, Status
from xvd.blkif.messages import IndirectRequest, OtherRequest
from xvd.types import Gref, RequestId

ABIS = pytest.mark.parametrize("abi", list(Abi), ids=lambda abi: abi.name)
READ_WRITE = 0x3


@ABIS
@pytest.mark.parametrize("operation", [4, 7, 8, 100, 127, 128, 255])
def test_an_unknown_operation_gets_its_id_back(abi: Abi, operation: int) -> None:
    with QueueWorld(abi=abi) as world:
        [answer] = world.ask(OtherRequest(operation, RequestId(0x1122_3344_5566_7788)))
        assert (answer.id, answer.operation) == (0x1122_3344_5566_7788, operation)
        assert answer.status == Status.EOPNOTSUPP
        world.still_serves()


@pytest.mark.parametrize("operation", [Op.WRITE_BARRIER, Op.FLUSH_DISKCACHE])
def test_an_operation_that_was_not_offered(operation: Op) -> None:
    with QueueWorld(offered=READ_WRITE) as world:
        world.refused(rq(operation), "not_offered", Status.EOPNOTSUPP)


def test_a_discard_that_was_not_offered() -> None:
    with QueueWorld(offered=READ_WRITE) as world:
        world.refused(discard(0, 8), "not_offered", Status.EOPNOTSUPP)


def test_a_secure_discard_that_was_not_offered_erases_nothing() -> None:
    with QueueWorld() as world:
        world.data(0)[:] = b"s" * 4096
        world.ask(rq(Op.WRITE, 0, world.segment(0)))
        world.refused(discard(0, 8, flag=1), "secure_not_offered", Status.EOPNOTSUPP)
        assert bytes(world.data(0)) == b"s" * 4096


@ABIS
def test_an_indirect_request_that_was_not_offered(abi: Abi) -> None:
    with QueueWorld(abi=abi) as world:
        request = IndirectRequest(Op.READ, RequestId(9), 0, 32, (Gref(8),))
        world.refused(request, "not_offered", Status.EOPNOTSUPP)
