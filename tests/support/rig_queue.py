# SPDX-License-Identifier: Apache-2.0
"""One backend queue, with a frontend that may write what it likes.

`QueueWorld` is a context manager; at its end everything is given back, and the machine's accounting
must show it.
"""

import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rig_xen import HOST, ON_XEN, open_machine

from xvd.blkif.abi import Abi, Op, Status
from xvd.blkif.messages import (
    AnyRequest,
    DiscardRequest,
    IndirectRequest,
    Request,
    Response,
    Segment,
    indirect_pages,
    pack_segments,
)
from xvd.blkif.nodes import QueueConfig
from xvd.blkif.ring import FrontRing, Outcome
from xvd.dataplane.back.journal import journal_size
from xvd.dataplane.back.options import BackOptions
from xvd.dataplane.back.queue import BackendQueue
from xvd.dataplane.loop.loop import Loop
from xvd.dataplane.types import StepFlag
from xvd.engines.interface import Engine
from xvd.engines.uri import open_engine
from xvd.machine.emulated.limits import Limits
from xvd.types import PAGE_SIZE, Domid, Gref, RequestId
from xvd.xenbus.links import BackLink

BACKEND, GUEST = Domid(0), Domid(1)
ALL = 1 << Op.READ | 1 << Op.WRITE | 1 << Op.FLUSH_DISKCACHE | 1 << Op.DISCARD
SMALL = Limits(pages=4096, grefs=2048, tracks=8192, ports=64)
NOTHING = {"sessions": 0, "pins": 0, "mappings": 0, "ports": 0, "pages": 0}

WORKED, BROKEN, DRAINED, EXCHANGED, LEFT = StepFlag


def rq(
    operation: Op, sector: int = 0, *segments: Segment, id: int = 1, claimed: int | None = None
) -> Request:
    return Request(operation, RequestId(id), sector, segments, claimed=claimed)


def discard(sector: int, sectors: int, *, id: int = 1, flag: int = 0) -> DiscardRequest:
    return DiscardRequest(RequestId(id), sector, sectors, flag)


class QueueWorld:
    """A queue, the raw ring in front of it, granted pages, and the storage behind it.

    `data_pages` pages are for data and 8 for the descriptors of indirect requests. `persistent`:
    how many grants may stay mapped, or None where they were not negotiated.
    """

    def __init__(
        self,
        uri: str | Engine = "memory:1M",
        *,
        abi: Abi = Abi.X86_64,
        offered: int = ALL,
        indirect_max: int = 0,
        copying: bool = False,
        read_only: bool = False,
        block_sectors: int = 1,
        wire_sector: int = 1,
        data_pages: int = 32,
        poison: int | None = None,
        persistent: int | None = None,
        max_pages: int = 1024,
        unmaps_at_once: bool = True,
    ) -> None:
        self.host = HOST(SMALL)
        self.guest = open_machine(self.host, GUEST)
        self.backend = open_machine(self.host, BACKEND)
        self.abi = abi
        self.ring_pages = self.guest.grants.share(BACKEND, 1)
        self.pages = self.guest.grants.share(BACKEND, data_pages)
        self.descriptors = self.guest.grants.share(BACKEND, 8)
        self.port = self.guest.event_channels.alloc_unbound(BACKEND)
        self.ring = FrontRing(self.ring_pages.view, abi).init()
        if poison is not None:
            self.ring_pages.view[64:] = bytes([poison]) * (PAGE_SIZE - 64)
        self.engine = open_engine(uri) if isinstance(uri, str) else uri
        self.channel = self.engine.open_channel()
        nodes = QueueConfig(tuple(self.ring_pages.grefs), self.port.port)
        self.link = BackLink(self.backend, GUEST, nodes, abi)
        self.mapping, self.backend_port = self.link.ring, self.link.channel
        self.grants = self.link.grants
        if not ON_XEN:
            self.grants.unmaps_at_once = unmaps_at_once
        self.journal = bytearray(journal_size(self.link.entries))
        self.options = BackOptions(
            capacity=self.engine.info.size // 512,
            block_sectors=block_sectors,
            wire_sector=wire_sector,
            read_only=read_only,
            offered=offered | (1 << Op.INDIRECT if indirect_max else 0),
            indirect_max=indirect_max,
            copying=copying,
            persistent=persistent is not None,
            persistent_max=persistent or 0,
            max_pages=max_pages,
        )
        self.queue = self.make_queue()

    def make_queue(self, *, resume: bool = False) -> BackendQueue:
        """The queue, or its successor on the same ring and with the same journal."""
        return self.link.prepare(self.channel, self.options, self.journal, resume=resume)

    def succeed(self) -> None:
        """The backend dies as by SIGKILL, and another takes the ring up with fresh storage."""
        self.queue.abandon()
        self.channel = self.engine.open_channel()
        self.queue = self.make_queue(resume=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.link.release()
        self.channel.close()
        self.engine.close()
        self.guest.close()
        self.backend.close()
        if exc is None:
            assert self.host.accounting() == NOTHING
        self.host.close()

    def segment(self, page: int, first: int = 0, last: int = 7) -> Segment:
        return Segment(self.pages.grefs[page], first, last)

    def data(self, page: int) -> memoryview:
        return self.pages.view[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]

    def indirect(
        self, operation: int, sector: int, segments: list[Segment], *, id: int = 1, first: int = 0
    ) -> IndirectRequest:
        """An indirect request; its segments are put into the descriptor pages from `first` on."""
        packed = pack_segments(segments)
        at = first * PAGE_SIZE
        self.descriptors.view[at : at + len(packed)] = packed
        grefs = self.descriptors.grefs[first : first + indirect_pages(len(segments))]
        return IndirectRequest(operation, RequestId(id), sector, len(segments), tuple(grefs))

    def send(self, *requests: AnyRequest | bytes) -> bool:
        """Put requests on the ring and publish them; whether the queue wants to hear of it."""
        for request in requests:
            self.ring.put_request(request)
        return self.ring.push()

    def settle(self) -> None:
        """Step the queue until it has nothing more to do; a pause of its own is over at once."""
        for _ in range(1000):
            if not self.queue.step() & WORKED:
                if not self.queue.due_ns:
                    return
                self.queue.set_time(self.queue.due_ns)
        raise AssertionError("the queue never comes to rest")

    def responses(self) -> list[Response]:
        found = []
        while True:
            outcome, response = self.ring.take_response()
            if outcome is not Outcome.RESPONSE:
                assert outcome is Outcome.EMPTY
                return found
            assert response is not None
            found.append(response)

    def collect(self, count: int) -> list[Response]:
        """Wait for that many responses of a queue that runs in its own thread."""
        found = self.responses()
        while len(found) < count:
            if not self.ring.final_check():
                assert select.select([self.port.fileno()], [], [], 10)[0], "no event came"
                self.port.consume()
            found += self.responses()
        return found

    def ask(self, *requests: AnyRequest | bytes) -> list[Response]:
        """Send, serve, and take what was answered."""
        self.send(*requests)
        self.settle()
        return self.responses()

    def refused(self, request: AnyRequest | bytes, reason: str, status: Status) -> None:
        """The request leaves one response of `status`, one count of `reason`, and nothing else."""
        answers = self.ask(request)
        counters = self.queue.counters()
        assert [answer.status for answer in answers] == [status]
        assert counters["refusals"] == {reason: 1}
        self.still_serves()

    def still_serves(self) -> None:
        """An honest request after all that is answered well; nothing is left in flight."""
        [answer] = self.ask(rq(Op.READ, 0, self.segment(0), id=77))
        assert (answer.id, answer.status) == (77, Status.OKAY)
        assert self.queue.in_flight == 0
        assert self.host.accounting()["pins"] == len(self.ring_pages.grefs)

    @contextmanager
    def running(self) -> Iterator[Loop]:
        """The queue in a native thread of its own, drained at the end."""
        loop = Loop(self.queue)
        thread = threading.Thread(target=loop.run)
        thread.start()
        try:
            yield loop
        finally:
            self.queue.stop()
            loop.wake()
            thread.join()


def bad_gref() -> Gref:
    """A reference that no domain of `SMALL` limits has granted."""
    return Gref(2000)
