# SPDX-License-Identifier: Apache-2.0
"""A file whose operations the kernel puts off for ever, as a descriptor that does not wait may."""

import os

from rig_engines import PythonEngine
from rig_queue import QueueWorld, rq

from xvd.blkif.abi import Op, Status
from xvd.engines.file import FileChannel, Health
from xvd.engines.interface import Channel


class PutOff(PythonEngine):
    """Answers EAGAIN to every read: an eventfd that nobody has rung."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def open_channel(self) -> Channel:
        flush = os.dup(self.fd)
        return FileChannel(-1, self.fd, flush, Health(), memory_align=1, offset_align=1)

    def close(self) -> None:
        os.close(self.fd)


def test_what_is_put_off_again_and_again_fails() -> None:
    with QueueWorld(PutOff()) as world, world.running() as loop:
        world.send(rq(Op.READ, 0, world.segment(0), id=3))
        loop.wake()

        [answer] = world.collect(1)

    assert (answer.id, answer.status) == (3, Status.ERROR)
