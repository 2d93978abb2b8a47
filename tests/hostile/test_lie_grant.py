# SPDX-License-Identifier: Apache-2.0
"""References that were never granted, are taken back, or are read-only where we write."""

import pytest
from rig_queue import QueueWorld, bad_gref, rq

from xvd.blkif.abi import Op, Status
from xvd.blkif.messages import Segment
from xvd.types import Gref

MODES = pytest.mark.parametrize("copying", [False, True], ids=["map", "copy"])
OPERATIONS = pytest.mark.parametrize("operation", [Op.READ, Op.WRITE, Op.FLUSH_DISKCACHE])


@MODES
@OPERATIONS
@pytest.mark.parametrize("gref", [0, 7, bad_gref(), 2048, 2**31, 2**32 - 1])
def test_a_gref_that_was_never_granted(copying: bool, operation: Op, gref: int) -> None:
    with QueueWorld(copying=copying) as world:
        request = rq(operation, 0, world.segment(0), Segment(Gref(gref)), world.segment(1))
        world.refused(request, "bad_grant", Status.ERROR)


@MODES
@pytest.mark.parametrize("position", [0, 5, 10])
def test_one_bad_gref_among_eleven_leaves_no_mapping(copying: bool, position: int) -> None:
    with QueueWorld(copying=copying) as world:
        segments = [world.segment(page) for page in range(11)]
        segments[position] = Segment(bad_gref())
        world.refused(rq(Op.WRITE, 0, *segments), "bad_grant", Status.ERROR)
        assert all(world.pages.revoke(page) for page in range(11))


@MODES
@OPERATIONS
def test_a_gref_revoked_before_the_request(copying: bool, operation: Op) -> None:
    with QueueWorld(copying=copying) as world:
        world.pages.revoke(3)
        world.refused(rq(operation, 0, world.segment(3)), "bad_grant", Status.ERROR)


@MODES
def test_a_read_into_a_page_granted_read_only(copying: bool) -> None:
    with QueueWorld(copying=copying) as world:
        world.data(3)[:] = b"r" * 4096
        world.pages.grant(3, readonly=True)
        world.refused(rq(Op.READ, 0, world.segment(3)), "bad_grant", Status.ERROR)
        assert bytes(world.data(3)) == b"r" * 4096


@MODES
def test_a_write_from_a_page_granted_read_only_is_what_they_are_for(copying: bool) -> None:
    with QueueWorld(copying=copying) as world:
        world.pages.grant(3, readonly=True)
        [answer] = world.ask(rq(Op.WRITE, 0, world.segment(3)))
        assert answer.status == Status.OKAY


@pytest.mark.parametrize("position", range(12))
def test_any_mapping_may_fail_and_only_its_request_does(position: int) -> None:
    with QueueWorld() as world:
        world.grants.inject([0] * position + [-3])
        answers = world.ask(
            *(rq(Op.READ, 8, world.segment(2 * i), world.segment(2 * i + 1), id=i)
              for i in range(6))
        )  # fmt: skip
        failed = [answer.id for answer in answers if answer.status != Status.OKAY]
        assert (failed, len(answers)) == ([position // 2], 6)
        world.still_serves()


@pytest.mark.parametrize("position", range(4))
def test_any_copy_may_fail_and_only_its_request_does(position: int) -> None:
    with QueueWorld(copying=True) as world:
        world.grants.inject([0] * position + [-1])
        answers = world.ask(
            rq(Op.WRITE, 0, world.segment(0), world.segment(1), id=0),
            rq(Op.READ, 64, world.segment(2), world.segment(3), id=1),
        )
        failed = [answer.id for answer in answers if answer.status != Status.OKAY]
        assert (failed, len(answers)) == ([position // 2], 2)
        world.still_serves()
