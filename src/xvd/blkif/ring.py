# SPDX-License-Identifier: Apache-2.0
"""The two ends of a shared ring, as readable as they can be: the executable specification.

The one idea: an end is two private indices over a page that the peer may rewrite at any moment.
Indices run freely through all u32 values and are cut down only to address a slot; every
comparison is a difference modulo 2^32, taken by `_distance` and nowhere else.

The compiled ring of the data plane is compared with this one, outcome by outcome and byte by
byte. Plain Python has no memory fence, so over really shared memory use the compiled one.

Names are those of Xen's ring.h. A backend *attaches* and a frontend *inits*, because only the
frontend may touch the shared header before the ring is published.
"""

from enum import IntEnum
from typing import Self

from xvd.blkif.abi import (
    RESPONSE,
    RING_HEADER_SIZE,
    SRING_REQ_EVENT,
    SRING_REQ_PROD,
    SRING_RSP_EVENT,
    SRING_RSP_PROD,
    Abi,
    nr_ents,
)
from xvd.blkif.messages import (
    AnyRequest,
    Response,
    pack_request,
    pack_response_into,
    unpack_response,
)
from xvd.errors import LocalProtocolError, PeerProtocolError
from xvd.types import PAGE_SIZE

__all__ = ["BackRing", "FrontRing", "Outcome", "must_notify"]


class Outcome(IntEnum):
    """What an attempt to take one entry came to."""

    EMPTY = 0
    """Nothing that may be taken now."""
    REQUEST = 1
    RESPONSE = 2
    BROKEN = 3
    """The peer's producer index is further away than the ring is long: close the device."""


def _u32(value: int) -> int:
    return value & 0xFFFF_FFFF


def _distance(ahead: int, behind: int) -> int:
    return _u32(ahead - behind)


def must_notify(old: int, new: int, event: int) -> bool:
    """Whether moving a producer from `old` to `new` passes the peer's `event` (all u32).

    Source: ``RING_PUSH_*_AND_CHECK_NOTIFY`` of ring.h.
    """
    return _distance(new, event) < _distance(new, old)


class _Ring:
    """What both ends share: the header's four words, and where slot i lies."""

    def __init__(
        self, view: memoryview, abi: Abi, pages: int = 1, entries: int | None = None
    ) -> None:
        """Lay an end over `view`: writable bytes of `pages` contiguous pages.

        `entries` overrides the number of slots, for tests; a power of two that fits.
        LocalProtocolError when the view is too short, or `entries` no power of two, or too many.
        """
        if len(view) < pages * PAGE_SIZE:
            raise LocalProtocolError(f"{pages} ring pages do not fit in {len(view)} bytes")
        self.nr_ents = nr_ents(pages, abi) if entries is None else entries
        if self.nr_ents & (self.nr_ents - 1) or not 0 < self.nr_ents <= nr_ents(pages, abi):
            raise LocalProtocolError(f"{self.nr_ents} slots do not make a ring of {pages} pages")
        self.abi = abi
        self._bytes = view[: pages * PAGE_SIZE]
        # An element of an 'I' view is loaded and stored whole; a slice of bytes might be torn.
        self._words = self._bytes[:RING_HEADER_SIZE].cast("I")

    def _load(self, header_offset: int) -> int:
        return self._words[header_offset // 4]

    def _store(self, header_offset: int, index: int) -> None:
        self._words[header_offset // 4] = _u32(index)

    def _slot(self, index: int) -> int:
        return RING_HEADER_SIZE + (index & (self.nr_ents - 1)) * self.abi.entry_size

    def _publish(self, prod: int, event: int, old: int, index: int) -> bool:
        self._store(prod, index)
        # Here the compiled ring has its full fence: the store before, the load after.
        return must_notify(old, index, self._load(event))


class BackRing(_Ring):
    """The backend's end. Indices start at 0; `attach` takes them from the shared page instead.

    Used by one thread at a time.
    """

    req_cons = 0
    """The next request to read, u32."""
    rsp_prod_pvt = 0
    """The next response to fill, u32."""
    rsp_prod = 0
    """What was published last, u32: our word on the page is never read back."""

    def attach(self) -> Self:
        """Start where the ring stands: at the last response that was published.

        On a fresh ring that is 0. On a live one, whose backend has died, every request since is
        taken again, which is right because the guest was never told that it ended (Linux >= 4.15
        does the same). Writes nothing. PeerProtocolError when the indices make no ring.
        """
        rsp_prod, req_prod = self._load(SRING_RSP_PROD), self._load(SRING_REQ_PROD)
        if _distance(req_prod, rsp_prod) > self.nr_ents:
            raise PeerProtocolError(
                f"the ring has {self.nr_ents} slots, but the frontend's req_prod {req_prod}"
                f" is {_distance(req_prod, rsp_prod)} ahead of rsp_prod {rsp_prod}"
            )
        self.rsp_prod = self.rsp_prod_pvt = self.req_cons = rsp_prod
        return self

    def unconsumed(self) -> int:
        """Requests that may be taken now, 0..nr_ents, without judging the peer's index.

        Bounded by the slots that are free of unanswered requests: a response may need any slot.
        """
        waiting = _distance(self._load(SRING_REQ_PROD), self.req_cons)
        room = self.nr_ents - _distance(self.req_cons, self.rsp_prod_pvt)
        return max(0, min(waiting, room))

    def _broken(self) -> bool:
        return _distance(self._load(SRING_REQ_PROD), self.rsp_prod_pvt) > self.nr_ents

    def take(self) -> tuple[Outcome, bytes]:
        """Copy the next request's slot out of the ring: (REQUEST, slot), or (EMPTY or BROKEN, b"").

        BROKEN is said as long as req_prod is more than nr_ents ahead of the last response; the
        caller stops using the ring, its device is lost.
        """
        if self._broken():
            return Outcome.BROKEN, b""
        if self.unconsumed() == 0:
            return Outcome.EMPTY, b""
        at = self._slot(self.req_cons)
        slot = bytes(self._bytes[at : at + self.abi.entry_size])
        self.req_cons = _u32(self.req_cons + 1)
        return Outcome.REQUEST, slot

    def put_response(self, response: Response) -> None:
        """Fill the next response, not yet published; only its three fields are written (XSA-216).

        LocalProtocolError when every request taken so far is answered already.
        """
        if self.rsp_prod_pvt == self.req_cons:
            raise LocalProtocolError(f"response {response.id} answers no request that was taken")
        pack_response_into(self.abi, self._bytes, self._slot(self.rsp_prod_pvt), response)
        self.rsp_prod_pvt = _u32(self.rsp_prod_pvt + 1)

    def push(self) -> bool:
        """Publish the responses filled so far; True when the frontend must be notified."""
        old, self.rsp_prod = self.rsp_prod, self.rsp_prod_pvt
        return self._publish(SRING_RSP_PROD, SRING_RSP_EVENT, old, self.rsp_prod)

    def final_check(self) -> bool:
        """Ask for an event at the next request; True when there is work already: do not sleep.

        When requests wait at once, no event is asked for. A broken ring is work: `take` says so.
        """
        if self._broken() or self.unconsumed():
            return True
        self._store(SRING_REQ_EVENT, self.req_cons + 1)
        return self._broken() or self.unconsumed() > 0


class FrontRing(_Ring):
    """The frontend's end. Used by one thread at a time; never reads back what it wrote."""

    req_prod_pvt = 0
    """The next request to fill, u32."""
    req_prod = 0
    """What was published last, u32."""
    rsp_cons = 0
    """The next response to read, u32."""

    def init(self, start: int = 0) -> Self:
        """Zero the pages and initialise the header, as only the frontend may, before publishing.

        `start` is where all indices begin: 0 for every peer but a test of the wrap at 2^32.
        """
        self._bytes[:] = bytes(len(self._bytes))
        self._store(SRING_REQ_PROD, start)
        self._store(SRING_RSP_PROD, start)
        self._store(SRING_REQ_EVENT, start + 1)
        self._store(SRING_RSP_EVENT, start + 1)
        self.req_prod = self.req_prod_pvt = self.rsp_cons = _u32(start)
        return self

    def free_slots(self) -> int:
        """Requests that can still be put, 0..nr_ents."""
        return self.nr_ents - self.outstanding()

    def outstanding(self) -> int:
        """Requests put whose responses have not been taken, 0..nr_ents."""
        return _distance(self.req_prod_pvt, self.rsp_cons)

    def unconsumed(self) -> int:
        """Responses published and not yet taken, without judging the peer's index."""
        return _distance(self._load(SRING_RSP_PROD), self.rsp_cons)

    def put_request(self, request: AnyRequest | bytes) -> None:
        """Fill the next slot, not yet published, with a request or with a slot's raw bytes.

        LocalProtocolError when no slot is free, or raw bytes are longer than a slot.
        """
        if self.free_slots() == 0:
            raise LocalProtocolError(f"all {self.nr_ents} slots of the ring are in use")
        slot = request if isinstance(request, bytes) else pack_request(self.abi, request)
        if len(slot) > self.abi.entry_size:
            raise LocalProtocolError(f"a slot has {self.abi.entry_size} bytes, not {len(slot)}")
        at = self._slot(self.req_prod_pvt)
        self._bytes[at : at + len(slot)] = slot
        self.req_prod_pvt = _u32(self.req_prod_pvt + 1)

    def push(self) -> bool:
        """Publish the requests filled so far; True when the backend must be notified."""
        old, self.req_prod = self.req_prod, self.req_prod_pvt
        return self._publish(SRING_REQ_PROD, SRING_REQ_EVENT, old, self.req_prod)

    def take_response(self) -> tuple[Outcome, Response | None]:
        """The next response, copied out: (RESPONSE, it), or (EMPTY or BROKEN, None).

        BROKEN when rsp_prod is further ahead than there are requests to answer, which Linux
        allows up to the length of the ring. Whether the response answers anything is for
        `validate.check_response` to say.
        """
        unconsumed = self.unconsumed()
        if unconsumed > self.outstanding():
            return Outcome.BROKEN, None
        if unconsumed == 0:
            return Outcome.EMPTY, None
        at = self._slot(self.rsp_cons)
        slot = bytes(self._bytes[at : at + self.abi.size(RESPONSE)])
        self.rsp_cons = _u32(self.rsp_cons + 1)
        return Outcome.RESPONSE, unpack_response(self.abi, slot)

    def final_check(self, hold_off: int = 1) -> bool:
        """Ask for an event; True when there are responses already: do not sleep.

        `hold_off` asks to be woken only by that many responses. It is cut down to what is
        outstanding, since an event that waits for more would never come.
        """
        if self.unconsumed():
            return True
        ahead = max(1, min(hold_off, self.outstanding()))
        self._store(SRING_RSP_EVENT, self.rsp_cons + ahead)
        return self.unconsumed() > 0
