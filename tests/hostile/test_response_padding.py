# SPDX-License-Identifier: Apache-2.0
"""A response touches its three fields and not one byte between or behind them (XSA-216)."""

import pytest
from rig_queue import QueueWorld, rq

from xvd.blkif.abi import Abi, Op
from xvd.blkif.messages import pack_request


@pytest.mark.parametrize("abi", list(Abi), ids=lambda abi: abi.name)
def test_the_rest_of_the_slot_stays_as_it_was(abi: Abi) -> None:
    with QueueWorld(abi=abi, poison=0xA5) as world:
        request = rq(Op.FLUSH_DISKCACHE, id=0x0102030405060708)
        head = pack_request(abi, request)[:24]
        world.send(head)
        world.settle()
        slot = bytes(world.ring_pages.view[64 : 64 + abi.entry_size])
    wanted = bytearray(head) + b"\xa5" * (abi.entry_size - 24)
    wanted[0:8] = (0x0102030405060708).to_bytes(8, "little")
    wanted[8] = Op.FLUSH_DISKCACHE
    wanted[10:12] = bytes(2)
    assert slot == bytes(wanted)
