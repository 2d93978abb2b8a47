# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""The compiled rings as Python objects, for tests, tools and the simulator.

The queues use the functions of ring.pxd directly; these shells add nothing but bounds checks, so
that what the differential tests drive is what ships. One thread at a time.
"""

from libc.string cimport memcpy

from xvd.dataplane.abi cimport BLKIF_NR_ABI, BLKIF_RING_HEADER, blkif_layouts

from xvd.errors import LocalProtocolError


cdef int check_ring(uint64_t size, uint32_t nr_ents, int abi) except -1:
    """Whether memory of `size` bytes holds such a ring; LocalProtocolError if it does not."""
    if not 0 <= abi < BLKIF_NR_ABI:
        raise LocalProtocolError(f"there is no ABI {abi}")
    if nr_ents == 0 or nr_ents & (nr_ents - 1):
        raise LocalProtocolError(f"a ring has a power of two entries, not {nr_ents}")
    if BLKIF_RING_HEADER + <uint64_t>nr_ents * blkif_layouts[abi].entry_size > size:
        raise LocalProtocolError(f"{size} bytes are too few for {nr_ents} entries")
    return 0


cdef uint8_t *ring_memory(object view, uint32_t nr_ents, int abi) except NULL:
    """Check that the memory is writable and holds the ring; the address of its first byte."""
    cdef uint8_t[::1] bytes_ = view
    check_ring(bytes_.shape[0], nr_ents, abi)
    return &bytes_[0]


cdef class BackRing:
    """The backend's side over writable memory: `BackRing(view, nr_ents, abi)`, then `attach`."""

    def __init__(self, view, uint32_t nr_ents, int abi):
        self.r.sring = ring_memory(view, nr_ents, abi)
        self.memory = view
        self.r.nr_ents = nr_ents
        self.r.layout = &blkif_layouts[abi]

    def set_indices(self, uint32_t req_cons, uint32_t rsp_prod_pvt):
        """Start anywhere, with every response published: for tests at the wrap of the indices."""
        self.r.req_cons = req_cons
        self.r.rsp_prod_pvt = self.r.rsp_prod = rsp_prod_pvt

    @property
    def indices(self):
        """(req_cons, rsp_prod_pvt)."""
        return self.r.req_cons, self.r.rsp_prod_pvt

    def attach(self):
        """Take up the ring as it is; False if the frontend's index is insane."""
        return bool(back_attach(&self.r))

    def take(self):
        """(outcome, slot bytes): 0 empty, 1 taken, 2 broken."""
        cdef uint32_t count
        cdef int outcome = back_pending(&self.r, &count)
        if outcome != RING_TAKEN:
            return outcome, b""
        back_peek(&self.r, self.copy)
        back_take(&self.r)
        return outcome, self.copy[:self.r.layout.entry_size]

    def respond(self, uint64_t id, uint8_t operation, int16_t status):
        """Fill the next response slot; a request must have been taken for it."""
        if self.r.req_cons == self.r.rsp_prod_pvt:
            raise LocalProtocolError("every request taken has its response already")
        back_respond(&self.r, id, operation, status)

    def push(self):
        """Publish; True if the frontend wants an event."""
        return bool(back_push(&self.r))

    def final_check(self):
        """Ask for an event; True if there is work after all."""
        return bool(back_final_check(&self.r))


cdef class FrontRing:
    """The frontend's side over writable memory: `FrontRing(view, nr_ents, abi)`, then `init`."""

    def __init__(self, view, uint32_t nr_ents, int abi):
        self.r.sring = ring_memory(view, nr_ents, abi)
        self.memory = view
        self.r.nr_ents = nr_ents
        self.r.layout = &blkif_layouts[abi]

    def set_indices(self, uint32_t req_prod_pvt, uint32_t rsp_cons):
        """Start anywhere, with every request published: for tests at the wrap of the indices."""
        self.r.req_prod_pvt = self.r.req_prod = req_prod_pvt
        self.r.rsp_cons = rsp_cons

    @property
    def indices(self):
        """(req_prod_pvt, rsp_cons)."""
        return self.r.req_prod_pvt, self.r.rsp_cons

    def init(self):
        """Initialise the shared header."""
        front_init(&self.r)

    @property
    def free(self):
        """How many requests fit."""
        return front_free(&self.r)

    def put(self, const uint8_t[::1] slot):
        """Fill the next request slot with raw bytes, at most an entry long."""
        if front_free(&self.r) == 0:
            raise LocalProtocolError("the ring is full")
        if slot.shape[0] > self.r.layout.entry_size:
            raise LocalProtocolError(f"{slot.shape[0]} bytes do not fit an entry")
        memcpy(front_next_slot(&self.r), &slot[0], slot.shape[0])

    def push(self):
        """Publish; True if the backend wants an event."""
        return bool(front_push(&self.r))

    def take(self):
        """(outcome, response bytes): 0 empty, 1 taken, 2 broken."""
        cdef uint32_t count
        cdef int outcome = front_pending(&self.r, &count)
        if outcome != RING_TAKEN:
            return outcome, b""
        front_copy(&self.r, self.copy)
        return outcome, self.copy[:self.r.layout.response_size]

    def final_check(self):
        """Ask for an event; True if there is work after all."""
        return bool(front_final_check(&self.r))
