# SPDX-License-Identifier: Apache-2.0
"""One frontend queue on an emulated machine, with a backend that may answer what it likes."""

from types import TracebackType
from typing import Self

from rig_queue import BACKEND, GUEST, NOTHING, SMALL, machine

from xvd.blkif.abi import Abi, nr_ents
from xvd.blkif.messages import AnyRequest, Request, Response, unpack_request
from xvd.blkif.ring import BackRing, Outcome
from xvd.dataplane.front import FrontQueue
from xvd.machine.emulated.host import Host
from xvd.types import RequestId


class FrontWorld:
    """A queue, and the raw ring behind it, with the grants to move data."""

    def __init__(self, *, abi: Abi = Abi.X86_64, segments_max: int = 11) -> None:
        self.host = Host(SMALL)
        self.guest = machine(self.host, GUEST)
        self.backend = machine(self.host, BACKEND)
        self.abi = abi
        self.ring_pages = self.guest.grants.share(BACKEND, 1)
        self.pages = self.guest.grants.share(BACKEND, nr_ents(1, abi) * 11)
        self.port = self.guest.event_channels.alloc_unbound(BACKEND)
        self.queue = FrontQueue(
            self.ring_pages.view, nr_ents(1, abi), abi.number, self.pages, self.port,
            handle=0xCA00, segments_max=segments_max,
        )  # fmt: skip
        self.grants = self.backend.grants.foreign(GUEST)
        self.mapping = self.grants.map(self.ring_pages.grefs)
        self.ring = BackRing(self.mapping.view, abi)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.mapping.close()
        self.grants.close()
        self.guest.close()
        self.backend.close()
        if exc is None:
            assert self.host.books() == NOTHING
        self.host.close()

    def requests(self) -> list[AnyRequest]:
        """Step the queue and take what it has put on the ring."""
        self.queue.step()
        found = []
        while True:
            outcome, slot = self.ring.take()
            if outcome is not Outcome.REQUEST:
                return found
            found.append(unpack_request(self.abi, slot))

    def answer(self, id: int, operation: int, status: int = 0) -> None:
        self.ring.put_response(Response(RequestId(id), operation, status))

    def push(self) -> int:
        """Publish the answers and let the queue look; its flags."""
        self.ring.push()
        return self.queue.step()

    def serve(self, data: bytes = b"") -> list[AnyRequest]:
        """Answer everything as an honest backend; reads are filled with `data`, repeated."""
        done: list[AnyRequest] = []
        while requests := self.requests():
            for request in requests:
                operation = getattr(request, "operation", 5)
                if operation == 0 and data:
                    assert isinstance(request, Request)
                    for segment in request.segments:
                        size = segment.sectors * 512
                        chunk = (data * (size // len(data) + 1))[:size]
                        self.grants.write(segment.gref, segment.first_sect * 512, chunk)
                self.answer(request.id, operation)
            self.push()
            done += requests
        return done
