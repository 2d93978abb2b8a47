# SPDX-License-Identifier: Apache-2.0
"""Whatever changes a read-only disk is refused; whatever does not is served (CVE-2013-2140)."""

import pytest
from rig_queue import QueueWorld, discard, rq

from xvd.blkif.abi import Op, Status


@pytest.mark.parametrize("operation", [Op.WRITE, Op.FLUSH_DISKCACHE])
def test_data_is_refused(operation: Op) -> None:
    with QueueWorld(read_only=True) as world:
        world.data(0)[:] = b"w" * 4096
        world.refused(rq(operation, 0, world.segment(0)), "read_only", Status.ERROR)
        assert bytes(world.data(0)) == bytes(4096)


def test_a_discard_is_refused() -> None:
    with QueueWorld(read_only=True) as world:
        world.refused(discard(0, 8), "read_only", Status.ERROR)


def test_an_empty_flush_is_served() -> None:
    with QueueWorld(read_only=True) as world:
        [answer] = world.ask(rq(Op.FLUSH_DISKCACHE))
        assert answer.status == Status.OKAY
