# SPDX-License-Identifier: Apache-2.0
"""What steps a disk's queues: the queues themselves, and from its first client on the clients."""

from rig_client import WRITE, new_client
from rig_disk import disk_world, run, until

from xvd.dataplane.front.queue import FrontQueue
from xvd.dataplane.loop.thread import LoopOptions, Queue
from xvd.export import nbd_protocol as nbd
from xvd.frontend.disk import Disk
from xvd.xenbus.runner import OnExit, Runner, Threads


class Watched(Threads):
    """Threads that say what they have been given to step."""

    def __init__(self) -> None:
        self.queues: list[Queue] = []

    def run(self, queue: Queue, name: str, on_exit: OnExit, options: LoopOptions) -> Runner:
        self.queues.append(queue)
        return super().run(queue, name, on_exit, options)


def test_a_queue_is_stepped_alone_until_its_first_client_comes() -> None:
    async def work() -> None:
        async with disk_world() as world:
            vbd = await world.attach()
            machine, store = await world.guest()
            path, runtime = f"device/vbd/{vbd.vdev}", Watched()
            async with await Disk.open(machine, store, path, runtime=runtime) as disk:
                assert {type(queue) for queue in runtime.queues} == {FrontQueue}
                client, data, got = new_client(), b"c" * 4096, bytearray()
                disk.attach(client.transmission)
                client.send(WRITE, 8192, len(data), payload=data)

                def answered() -> bool:
                    got.extend(client.received())
                    return len(got) >= len(nbd.simple_reply(7))

                await until(answered)
                assert client.asked == []  # the thread has done it, not the event loop
                assert await disk.read(8192, len(data)) == data
                assert {type(queue) for queue in runtime.queues} == {FrontQueue}
                client.socket.close()
                await until(lambda: client.left)
                disk.detach(client.transmission)
                client.transmission.close()

    run(work())
