# SPDX-License-Identifier: Apache-2.0
"""What a frontend publishes: a ring, data pages, a port; with its queue and thread.

Made in one piece or not at all, and given back in the opposite order.
"""

from collections.abc import Callable

from xvd.blkif.abi import MAX_SEGMENTS_PER_REQUEST, Abi, nr_ents
from xvd.blkif.nodes import FrontendConfig, QueueConfig
from xvd.dataplane.front import FrontQueue
from xvd.dataplane.ring import FrontRing
from xvd.dataplane.thread import Queue, QueueThread
from xvd.machine.interface import Machine
from xvd.types import Domid


class Connection:
    """Our side of one connection. `on_exit` is called when its thread has ended.

    Raises `GrantError` or `EventChannelError`, holding nothing, when a budget is used up.
    """

    def __init__(
        self,
        machine: Machine,
        peer: Domid,
        *,
        abi: Abi,
        handle: int,
        name: str,
        on_exit: Callable[[Exception | None], None],
    ) -> None:
        self._undo: list[Callable[[], None]] = []
        entries = nr_ents(1, abi)
        try:
            ring = machine.grants.share(peer, 1)
            self._undo.append(ring.close)
            FrontRing(ring.view, entries, abi.number).init()
            pages = machine.grants.share(peer, entries * MAX_SEGMENTS_PER_REQUEST)
            self._undo.append(pages.close)
            self.channel = machine.event_channels.alloc_unbound(peer)
            self._undo.append(self.channel.close)
            queue = QueueConfig(tuple(ring.grefs), self.channel.port)
            self.config = FrontendConfig(abi, (queue,))
            self.queue = FrontQueue(
                ring.view, entries, abi.number, pages, self.channel, handle=handle & 0xFFFF
            )
            self._name, self._on_exit = name, on_exit
            self.thread: QueueThread | None = None
        except BaseException:
            self.release()
            raise

    def start(self, stepper: Callable[[FrontQueue], Queue] | None = None) -> None:
        """Let the queue run: the backend is connected. `stepper` may put a load in its place."""
        queue = stepper(self.queue) if stepper is not None else self.queue
        self.thread = QueueThread(queue, self._name, self._on_exit)

    def release(self) -> None:
        """End the grants, free the port; only after the thread has ended.

        Pages that the backend still maps are freed when it lets go, and not reused before.
        """
        while self._undo:
            self._undo.pop()()
