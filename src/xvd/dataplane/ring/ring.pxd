# SPDX-License-Identifier: Apache-2.0
# Inline header of dataplane/ring/, for dataplane/back/ and dataplane/front/.
"""The shared ring: private indices of each side, and every access to the shared page.

All index arithmetic is unsigned and 32 bits wide; an index is reduced modulo the ring's size only
to address a slot. Nothing outside this file dereferences the shared page, or moves an index.

What this end has published is kept privately: its word on the shared page is written and never read
back, because the peer may have written something else there.
"""

from libc.stdint cimport int16_t, uint8_t, uint16_t, uint32_t, uint64_t

from xvd.dataplane.abi cimport (
    BLKIF_MAX_ENTRY_SIZE, BLKIF_RING_HEADER, SRING_INSTANCE, SRING_REQ_EVENT, SRING_REQ_PROD,
    SRING_RSP_EVENT, SRING_RSP_PROD, blkif_layout)
from xvd.dataplane.c cimport (
    DEBUG_ASSERT, xvd_copy_slot, xvd_fence, xvd_load64, xvd_load_acquire, xvd_put16, xvd_put64,
    xvd_store64, xvd_store_relaxed, xvd_store_release)


cdef enum ring_outcome:
    RING_EMPTY = 0
    RING_TAKEN = 1
    RING_BROKEN = 2              # the peer's index is further ahead than the ring is long

cdef struct back_ring:
    uint8_t *sring
    uint64_t gap                 # bytes between two pages of the ring; 0: it is in one piece
    const blkif_layout *layout
    uint32_t nr_ents
    uint32_t req_cons
    uint32_t rsp_prod_pvt
    uint32_t rsp_prod            # what was published last

cdef struct front_ring:
    uint8_t *sring
    uint64_t gap                 # as in `back_ring`
    uint8_t apart[BLKIF_MAX_ENTRY_SIZE]  # where a request is made if there are gaps
    const blkif_layout *layout
    uint32_t nr_ents
    uint32_t req_prod_pvt
    uint32_t req_prod            # what was published last
    uint32_t rsp_cons


cdef inline uint64_t slot_at(const blkif_layout *layout, uint32_t nr_ents,
                             uint32_t index) noexcept nogil:
    """Where a slot begins, in bytes of the ring."""
    return BLKIF_RING_HEADER + <uint64_t>(index & (nr_ents - 1)) * layout.entry_size


# ---- A ring whose pages are apart, because the pages of the kernel are larger than Xen's --------

cdef void copy_apart(uint8_t *private_copy, const uint8_t *sring, uint64_t gap, uint64_t at,
                     uint32_t size) noexcept nogil


cdef void put_apart(uint8_t *sring, uint64_t gap, uint64_t at, const void *private_copy,
                    uint32_t size) noexcept nogil


cdef void respond_apart(back_ring *r, uint64_t id, uint8_t operation, int16_t status) noexcept nogil


cdef inline bint publish(uint8_t *prod, uint8_t *event, uint32_t *published,
                         uint32_t new) noexcept nogil:
    """Publish a producer index; whether the peer asked to be told (io/ring.h, PUSH_..._NOTIFY)."""
    cdef uint32_t old = published[0]
    published[0] = new
    xvd_store_release(prod, new)
    xvd_fence()
    return <uint32_t>(new - xvd_load_acquire(event)) < <uint32_t>(new - old)


# ---- What stands on the page, for whoever has no end yet -------------------------------------

cdef inline uint32_t requests_published(const uint8_t *sring) noexcept nogil:
    return xvd_load_acquire(sring + SRING_REQ_PROD)


cdef inline uint32_t responses_published(const uint8_t *sring) noexcept nogil:
    return xvd_load_acquire(sring + SRING_RSP_PROD)


cdef inline uint64_t instance_of(const uint8_t *sring) noexcept nogil:
    """The number that a backend has given to this ring; 0 on one that a frontend has just made."""
    return xvd_load64(sring + SRING_INSTANCE)


cdef inline void set_instance(uint8_t *sring, uint64_t instance) noexcept nogil:
    xvd_store64(sring + SRING_INSTANCE, instance)


# ---- Backend's side --------------------------------------------------------------------------

cdef inline bint back_attach(back_ring *r) noexcept nogil:
    """Start from what is on the ring: requests not yet answered are (re-)executed.

    False if the frontend's index is more than a ring ahead (Linux blkback: -EIO).
    """
    cdef uint32_t rsp_prod = responses_published(r.sring)
    if <uint32_t>(requests_published(r.sring) - rsp_prod) > r.nr_ents:
        return False
    r.req_cons = r.rsp_prod_pvt = r.rsp_prod = rsp_prod
    return True


cdef inline void back_resume(back_ring *r, uint32_t req_cons, uint32_t rsp_prod_pvt) noexcept nogil:
    """Go on from the private indices of a predecessor, who may have died before it published."""
    r.req_cons, r.rsp_prod_pvt = req_cons, rsp_prod_pvt
    r.rsp_prod = responses_published(r.sring)


cdef inline int back_pending(back_ring *r, uint32_t *count) noexcept nogil:
    """How many requests may be taken now, by one read of req_prod.

    A producer further ahead than the ring is long would make us walk old entries for ever; the
    ring is not served any more (Linux 8e3f8755). A full ring is legal.
    """
    cdef uint32_t req_prod = xvd_load_acquire(r.sring + SRING_REQ_PROD)
    cdef uint32_t unread = req_prod - r.req_cons
    cdef uint32_t room = r.nr_ents - <uint32_t>(r.req_cons - r.rsp_prod_pvt)
    if <uint32_t>(req_prod - r.rsp_prod_pvt) > r.nr_ents:
        count[0] = 0
        return RING_BROKEN
    count[0] = unread if unread < room else room
    return RING_TAKEN if count[0] else RING_EMPTY


cdef inline void back_peek(back_ring *r, void *private_copy) noexcept nogil:
    """Copy the next request out and leave it there; `back_take` takes it. Only after
    `back_pending` counted it.

    Whoever looks again later copies again, and may see another request.
    """
    cdef uint64_t at = slot_at(r.layout, r.nr_ents, r.req_cons)
    if r.gap:
        copy_apart(<uint8_t *>private_copy, r.sring, r.gap, at, r.layout.entry_size)
    else:
        xvd_copy_slot(private_copy, r.sring + at, r.layout.entry_size)


cdef inline uint32_t back_take(back_ring *r) noexcept nogil:
    """Step over the request that was copied; the index of its slot."""
    r.req_cons += 1
    return r.req_cons - 1


cdef inline void back_respond(back_ring *r, uint64_t id, uint8_t operation,
                              int16_t status) noexcept nogil:
    """Write a response's three fields and nothing else: what lies between them is not ours to
    fill, and a copy of a struct would leak this process's memory (XSA-216)."""
    cdef uint8_t *slot = r.sring + slot_at(r.layout, r.nr_ents, r.rsp_prod_pvt)
    DEBUG_ASSERT(<uint32_t>(r.req_cons - r.rsp_prod_pvt) - 1 < r.nr_ents)
    if r.gap:
        respond_apart(r, id, operation, status)
    else:
        xvd_put64(slot + r.layout.response_id, id)
        slot[r.layout.response_operation] = operation
        xvd_put16(slot + r.layout.response_status, <uint16_t>status)
    r.rsp_prod_pvt += 1


cdef inline bint back_push(back_ring *r) noexcept nogil:
    """Publish the responses; True if the frontend wants an event."""
    return publish(r.sring + SRING_RSP_PROD, r.sring + SRING_RSP_EVENT, &r.rsp_prod,
                   r.rsp_prod_pvt)


cdef inline bint back_has_news(const back_ring *r) noexcept nogil:
    """Whether the frontend has published more than was taken, or a lie: one load, for waiting."""
    return xvd_load_acquire(r.sring + SRING_REQ_PROD) != r.req_cons


cdef inline bint back_final_check(back_ring *r) noexcept nogil:
    """Ask for an event at the next request and look once more: True if there is one already."""
    cdef uint32_t count
    if back_pending(r, &count) != RING_EMPTY:
        return True
    xvd_store_relaxed(r.sring + SRING_REQ_EVENT, r.req_cons + 1)
    # Without it our look could come before the frontend sees the wish: both would then wait.
    xvd_fence()
    return back_pending(r, &count) != RING_EMPTY


# ---- Frontend's side -------------------------------------------------------------------------

cdef inline void front_init(front_ring *r) noexcept nogil:
    """Initialise the shared header of a zeroed page: the frontend's to do, before it publishes."""
    xvd_store_relaxed(r.sring + SRING_REQ_PROD, 0)
    xvd_store_relaxed(r.sring + SRING_RSP_PROD, 0)
    xvd_store64(r.sring + SRING_INSTANCE, 0)
    xvd_store_relaxed(r.sring + SRING_REQ_EVENT, 1)
    xvd_store_release(r.sring + SRING_RSP_EVENT, 1)
    r.req_prod_pvt = r.req_prod = r.rsp_cons = 0


cdef inline uint32_t front_free(front_ring *r) noexcept nogil:
    return r.nr_ents - <uint32_t>(r.req_prod_pvt - r.rsp_cons)


cdef inline uint8_t *front_next_slot(front_ring *r) noexcept nogil:
    """The slot of the next request, to be filled whole; then `front_put` steps over it."""
    DEBUG_ASSERT(front_free(r) > 0)
    if r.gap:
        return r.apart
    return r.sring + slot_at(r.layout, r.nr_ents, r.req_prod_pvt)


cdef inline void front_put(front_ring *r) noexcept nogil:
    """The next slot is filled: step over it."""
    if r.gap:
        put_apart(r.sring, r.gap, slot_at(r.layout, r.nr_ents, r.req_prod_pvt), r.apart,
                  r.layout.entry_size)
    r.req_prod_pvt += 1


cdef inline bint front_push(front_ring *r) noexcept nogil:
    """Publish the requests; True if the backend wants an event."""
    return publish(r.sring + SRING_REQ_PROD, r.sring + SRING_REQ_EVENT, &r.req_prod,
                   r.req_prod_pvt)


cdef inline int front_pending(front_ring *r, uint32_t *count) noexcept nogil:
    """How many responses may be taken now, by one read of rsp_prod.

    More than we have asked for is a lie of the backend: the device goes into its error state.
    """
    count[0] = xvd_load_acquire(r.sring + SRING_RSP_PROD) - r.rsp_cons
    if count[0] > <uint32_t>(r.req_prod_pvt - r.rsp_cons):
        count[0] = 0
        return RING_BROKEN
    return RING_TAKEN if count[0] else RING_EMPTY


cdef inline void front_copy(front_ring *r, void *private_copy) noexcept nogil:
    """Copy the next response's slot out and step over it. Only after `front_pending` counted it."""
    cdef uint64_t at = slot_at(r.layout, r.nr_ents, r.rsp_cons)
    if r.gap:
        copy_apart(<uint8_t *>private_copy, r.sring, r.gap, at, r.layout.response_size)
    else:
        xvd_copy_slot(private_copy, r.sring + at, r.layout.response_size)
    r.rsp_cons += 1


cdef inline bint front_has_news(const front_ring *r) noexcept nogil:
    return xvd_load_acquire(r.sring + SRING_RSP_PROD) != r.rsp_cons


cdef inline bint front_final_check(front_ring *r) noexcept nogil:
    """Ask for an event at the next response and look once more: True if there is one already."""
    cdef uint32_t count
    if front_pending(r, &count) != RING_EMPTY:
        return True
    xvd_store_relaxed(r.sring + SRING_RSP_EVENT, r.rsp_cons + 1)
    xvd_fence()
    return front_pending(r, &count) != RING_EMPTY


cdef int check_ring(uint64_t size, uint32_t nr_ents, int abi, uint32_t stride) except -1


cdef uint64_t gap_of(uint32_t nr_ents, int abi, uint32_t stride) noexcept


cdef class BackRing:
    cdef back_ring r
    cdef object memory
    cdef uint8_t copy[BLKIF_MAX_ENTRY_SIZE]

cdef class FrontRing:
    cdef front_ring r
    cdef object memory
    cdef uint8_t copy[BLKIF_MAX_ENTRY_SIZE]
