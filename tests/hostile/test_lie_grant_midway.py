# SPDX-License-Identifier: Apache-2.0
"""A grant taken back, and a request rewritten, while the storage works on it."""

from rig_engines import ByHand
from rig_queue import QueueWorld, rq

from xvd.blkif.abi import Abi, Op, Status
from xvd.blkif.messages import pack_request


def test_a_grant_in_use_cannot_be_revoked() -> None:
    engine = ByHand(1 << 20)
    with QueueWorld(engine) as world:
        world.send(rq(Op.READ, 0, world.segment(0)))
        world.settle()
        assert not world.pages.revoke(0)
        engine.channel.take()[0].complete()
        world.settle()
        assert world.pages.revoke(0)
        assert [answer.status for answer in world.responses()] == [Status.OKAY]


def test_a_grant_revoked_before_a_read_is_copied_out() -> None:
    engine = ByHand(1 << 20)
    with QueueWorld(engine, copying=True) as world:
        world.send(rq(Op.READ, 0, world.segment(0)))
        world.settle()
        world.pages.revoke(0)
        engine.channel.take()[0].complete()
        world.settle()
        assert [answer.status for answer in world.responses()] == [Status.ERROR]
        assert world.queue.counters()["refusals"] == {"bad_grant": 1}
        assert bytes(world.data(0)) == bytes(4096)


def test_a_failed_read_leaves_the_guests_page_alone() -> None:
    engine = ByHand(1 << 20)
    with QueueWorld(engine, copying=True) as world:
        world.data(0)[:] = b"g" * 4096
        world.send(rq(Op.READ, 0, world.segment(0)))
        world.settle()
        [operation] = engine.channel.take()
        operation.buffers()[0][:] = b"x" * 4096
        operation.complete(5)
        world.settle()
        assert [answer.status for answer in world.responses()] == [Status.ERROR]
        assert bytes(world.data(0)) == b"g" * 4096


def test_a_request_rewritten_after_it_was_taken_is_served_as_it_was() -> None:
    """XSA-155: whoever reads the slot twice can be shown two requests."""
    engine = ByHand(1 << 20)
    with QueueWorld(engine) as world:
        world.send(rq(Op.WRITE, 8, world.segment(0, 0, 0), id=1))
        world.settle()
        second = pack_request(Abi.X86_64, rq(Op.READ, 0, *[world.segment(9)] * 11, id=2))
        world.ring_pages.view[64 : 64 + len(second)] = second
        [operation] = engine.channel.take()
        asked = (operation.kind, operation.offset, operation.length)
        operation.complete()
        world.settle()
        [answer] = world.responses()
        assert asked == ("write", 4096, 512)
        assert (answer.id, answer.operation, answer.status) == (1, Op.WRITE, Status.OKAY)


def test_data_rewritten_after_it_was_copied_in_is_stored_as_it_was() -> None:
    engine = ByHand(1 << 20)
    with QueueWorld(engine, copying=True) as world:
        world.data(0)[:] = b"1" * 4096
        world.send(rq(Op.WRITE, 8, world.segment(0)))
        world.settle()
        world.data(0)[:] = b"2" * 4096
        [operation] = engine.channel.take()
        stored = bytes(operation.buffers()[0])
        operation.complete()
        world.settle()
        assert stored == b"1" * 4096
