# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""The compiled rings as Python objects, for tests, tools and the simulator.

The queues use the functions of ring.pxd directly; these shells add nothing but bounds checks, so
that what the differential tests drive is what ships. One thread at a time.
"""

from libc.string cimport memcpy

from xvd.dataplane.abi cimport BLKIF_NR_ABI, BLKIF_RING_HEADER, XEN_PAGE_SIZE, blkif_layouts

from xvd.errors import LocalProtocolError


cdef uint8_t *byte_apart(const uint8_t *sring, uint64_t gap, uint64_t at) noexcept nogil:
    return <uint8_t *>sring + at + at // XEN_PAGE_SIZE * gap


cdef uint32_t to_page_end(uint64_t at, uint32_t size) noexcept nogil:
    return <uint32_t>min(<uint64_t>size, XEN_PAGE_SIZE - at % XEN_PAGE_SIZE)


cdef void copy_apart(uint8_t *private_copy, const uint8_t *sring, uint64_t gap, uint64_t at,
                     uint32_t size) noexcept nogil:
    """Copy a slot, each word once, that may lie on two pages; both pieces are whole words."""
    cdef uint32_t here = to_page_end(at, size)
    xvd_copy_slot(private_copy, byte_apart(sring, gap, at), here)
    xvd_copy_slot(private_copy + here, byte_apart(sring, gap, at + here), size - here)


cdef void put_apart(uint8_t *sring, uint64_t gap, uint64_t at, const void *private_copy,
                    uint32_t size) noexcept nogil:
    """Write bytes of a slot, which may lie on two pages."""
    cdef uint32_t here = to_page_end(at, size)
    memcpy(byte_apart(sring, gap, at), private_copy, here)
    memcpy(byte_apart(sring, gap, at + here), <const uint8_t *>private_copy + here, size - here)


cdef void respond_apart(back_ring *r, uint64_t id, uint8_t operation,
                        int16_t status) noexcept nogil:
    """Write a response's three fields, as `back_respond` does."""
    cdef uint64_t at = slot_at(r.layout, r.nr_ents, r.rsp_prod_pvt)
    put_apart(r.sring, r.gap, at + r.layout.response_id, &id, sizeof(id))
    put_apart(r.sring, r.gap, at + r.layout.response_operation, &operation, sizeof(operation))
    put_apart(r.sring, r.gap, at + r.layout.response_status, &status, sizeof(status))


cdef uint64_t ring_bytes(uint32_t nr_ents, int abi, uint32_t stride) noexcept:
    """How many bytes of memory such a ring needs, with the gaps between its pages."""
    cdef uint64_t size = BLKIF_RING_HEADER + <uint64_t>nr_ents * blkif_layouts[abi].entry_size
    return size + (size - 1) // XEN_PAGE_SIZE * (stride - XEN_PAGE_SIZE)


cdef int check_ring(uint64_t size, uint32_t nr_ents, int abi, uint32_t stride) except -1:
    """Whether memory of `size` bytes holds such a ring; LocalProtocolError if it does not."""
    if not 0 <= abi < BLKIF_NR_ABI:
        raise LocalProtocolError(f"there is no ABI {abi}")
    if nr_ents == 0 or nr_ents & (nr_ents - 1):
        raise LocalProtocolError(f"a ring has a power of two entries, not {nr_ents}")
    if stride < XEN_PAGE_SIZE:
        raise LocalProtocolError(f"pages of {XEN_PAGE_SIZE} bytes cannot be {stride} bytes apart")
    if ring_bytes(nr_ents, abi, stride) > size:
        raise LocalProtocolError(f"{size} bytes are too few for {nr_ents} entries")
    return 0


cdef uint64_t gap_of(uint32_t nr_ents, int abi, uint32_t stride) noexcept:
    """The gap between a ring's pages that are `stride` bytes apart: none in a ring of one page."""
    cdef uint64_t size = BLKIF_RING_HEADER + <uint64_t>nr_ents * blkif_layouts[abi].entry_size
    return stride - XEN_PAGE_SIZE if size > XEN_PAGE_SIZE else 0


cdef uint8_t *ring_memory(object view, uint32_t nr_ents, int abi, uint32_t stride) except NULL:
    """Check that the memory is writable and holds the ring; the address of its first byte."""
    cdef uint8_t[::1] bytes_ = view
    check_ring(bytes_.shape[0], nr_ents, abi, stride)
    return &bytes_[0]


cdef class BackRing:
    """The backend's side over writable memory: `BackRing(view, nr_ents, abi)`, then `attach`.

    stride: bytes from one page of 4096 to the next; the memory in between is not touched.
    """

    def __init__(self, view, uint32_t nr_ents, int abi, *, uint32_t stride=XEN_PAGE_SIZE):
        self.r.sring = ring_memory(view, nr_ents, abi, stride)
        self.r.gap = gap_of(nr_ents, abi, stride)
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
    """The frontend's side over writable memory: `FrontRing(view, nr_ents, abi)`, then `init`.

    stride: as in `BackRing`.
    """

    def __init__(self, view, uint32_t nr_ents, int abi, *, uint32_t stride=XEN_PAGE_SIZE):
        self.r.sring = ring_memory(view, nr_ents, abi, stride)
        self.r.gap = gap_of(nr_ents, abi, stride)
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
        front_put(&self.r)

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
