# SPDX-License-Identifier: Apache-2.0
"""One frontend queue, with a backend that may answer what it likes."""

from types import TracebackType
from typing import Self

from rig_queue import BACKEND, GUEST, NOTHING, SMALL
from rig_xen import HOST, open_machine

from xvd.blkif.abi import SEGMENTS_PER_INDIRECT_PAGE, Abi, Op
from xvd.blkif.messages import (
    AnyRequest,
    IndirectRequest,
    Request,
    Response,
    Segment,
    unpack_request,
    unpack_segments,
)
from xvd.blkif.ring import BackRing, Outcome
from xvd.dataplane.front.options import FrontOptions
from xvd.machine.emulated.limits import Limits
from xvd.machine.interface import Mapping
from xvd.types import Gref, RequestId
from xvd.xenbus.links import FrontLink


class FrontWorld:
    """A queue, and the raw ring behind it, with the grants to move data.

    keeping: the backend keeps what it has mapped once, as one with persistent grants does.
    """

    def __init__(
        self,
        *,
        abi: Abi = Abi.X86_64,
        ring_pages: int = 1,
        segments_max: int = 11,
        pool: int | None = None,
        persistent: bool = False,
        keeping: bool = False,
        block_sectors: int = 1,
        wire_sector: int = 1,
        page_grants: int = 1,
        trusted: bool = True,
        limits: Limits = SMALL,
    ) -> None:
        self.host = HOST(limits)
        self.guest = open_machine(self.host, GUEST)
        self.backend = open_machine(self.host, BACKEND)
        self.abi = abi
        self.link = FrontLink(self.guest, BACKEND, ring_pages, abi)
        self.entries = self.link.entries
        self.ring_pages, self.port = self.link.ring, self.link.channel
        self.pages = self.guest.grants.share(BACKEND, pool or self.entries * 11)
        options = FrontOptions(
            handle=0xCA00, segments_max=segments_max, block_sectors=block_sectors,
            wire_sector=wire_sector, page_grants=page_grants, persistent=persistent,
            trusted=trusted,
        )  # fmt: skip
        self.queue = self.link.prepare(self.pages, options)
        self.grants = self.backend.grants.foreign(GUEST)
        self.mapping = self.grants.map(self.ring_pages.grefs)
        self.ring = BackRing(self.mapping.view, abi, ring_pages)
        self.keeping = keeping
        self.kept: dict[Gref, Mapping] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.let_go()
        self.mapping.close()
        self.grants.close()
        self.guest.close()
        self.backend.close()
        if exc is None:
            assert self.host.accounting() == NOTHING
        self.host.close()

    def drop_queue(self) -> None:
        """Let the queue go whatever is under way, as an end does that nobody waits for."""
        self.link.release()
        del self.link, self.queue

    # ---- The frontend's turn ----

    def requests(self) -> list[AnyRequest]:
        """Step the queue and take what it has put on the ring."""
        self.queue.step()
        found = []
        while True:
            outcome, slot = self.ring.take()
            if outcome is not Outcome.REQUEST:
                return found
            found.append(unpack_request(self.abi, slot))

    # ---- The backend's turn ----

    def segments(self, request: AnyRequest) -> tuple[Segment, ...]:
        """Where a request's data lies; read from its pages of descriptors if it has them."""
        if isinstance(request, Request):
            return request.segments
        if not isinstance(request, IndirectRequest):
            return ()
        left, found = request.nr_segments, []
        for gref in request.indirect_grefs:
            here = min(left, SEGMENTS_PER_INDIRECT_PAGE)
            found += unpack_segments(bytes(self.page(gref)[: here * 8]), here)
            left -= here
        return tuple(found)

    def page(self, gref: Gref) -> memoryview | bytes:
        """A granted page as the backend sees it: kept mapped, or copied out."""
        if not self.keeping:
            return self.grants.read(gref, 0, 4096)
        if gref not in self.kept:
            self.kept[gref] = self.grants.map([gref])
        return self.kept[gref].view

    def let_go(self, *grefs: Gref) -> None:
        """Unmap what was kept: these, or all."""
        for gref in grefs or tuple(self.kept):
            self.kept.pop(gref).close()

    def data(self, request: AnyRequest) -> bytes:
        """What a request carries to the backend."""
        parts = [
            bytes(self.page(s.gref)[s.first_sect * 512 : (s.last_sect + 1) * 512])
            for s in self.segments(request)
        ]
        return b"".join(parts)

    def fill(self, request: AnyRequest, data: bytes) -> None:
        """Put `data`, repeated, where a read wants it."""
        segments = self.segments(request)
        size = sum(segment.sectors for segment in segments) * 512
        stream = (data * (size // len(data) + 1))[:size]
        at = 0
        for segment in segments:
            end = at + segment.sectors * 512
            self.page(segment.gref)
            self.grants.write(segment.gref, segment.first_sect * 512, stream[at:end])
            at = end

    def answer(self, id: int, operation: int, status: int = 0) -> None:
        self.ring.put_response(Response(RequestId(id), operation, status))

    def push(self) -> int:
        """Publish the answers and step the queue; its flags."""
        self.ring.push()
        return self.queue.step()

    def reply(self, *requests: AnyRequest, status: int = 0) -> int:
        """Answer these, in this order, and step the queue; its flags."""
        for request in requests:
            self.answer(request.id, operation_of(request), status)
        return self.push()

    def serve(self, data: bytes = b"") -> list[AnyRequest]:
        """Answer everything as an honest backend; reads are filled with `data`, repeated."""
        done: list[AnyRequest] = []
        while requests := self.requests():
            for request in requests:
                if operation_of(request) == Op.READ and data:
                    self.fill(request, data)
                elif self.keeping:
                    self.data(request)
            self.reply(*requests)
            done += requests
        return done


def operation_of(request: AnyRequest) -> int:
    """The operation that an honest answer names."""
    if isinstance(request, IndirectRequest):
        return request.indirect_op
    return getattr(request, "operation", Op.DISCARD)
