# SPDX-License-Identifier: Apache-2.0
# Inline header of dataplane/back/.
"""Indirect requests: their segments are fetched from granted pages, once, and judged as a copy.

The pages are the frontend's and may change while we look (XSA-155), so their bytes are copied to
private memory before the first of them is read. The copy is a grant copy even where data is mapped:
a few kilobytes cost less than mapping a page and shooting it down again. Where mappings are kept
they are read from those: the pages come from the same pool as the data's, as in blkback.
"""

from libc.stdint cimport uint8_t, uint32_t

from xvd.dataplane.abi cimport (
    BLKIF_SEGMENTS_PER_INDIRECT_PAGE, REFUSAL_BAD_GRANT, REFUSAL_NONE, XEN_PAGE_SIZE)
from xvd.dataplane.back.grants cimport hold_grant, is_shortage, map_fresh, next_copy, run_copies
from xvd.dataplane.back.pending cimport backend_queue, pending
from xvd.dataplane.back.persistent cimport NOBODY, release_grant
from xvd.dataplane.back.request cimport check_data, parse_segments, request
from xvd.dataplane.c cimport xvd_copy_slot
from xvd.dataplane.ports cimport grant_copy


cdef inline uint32_t pages_of(const request *rq) noexcept nogil:
    return ((rq.nr_segments + BLKIF_SEGMENTS_PER_INDIRECT_PAGE - 1)
            // BLKIF_SEGMENTS_PER_INDIRECT_PAGE)


cdef inline void hold_descriptors(backend_queue *q, pending *p) noexcept nogil:
    """Use the persistent grants of a request's indirect pages, for as long as the copy takes."""
    cdef uint32_t page
    for page in range(pages_of(&p.rq)):
        p.room.held[page] = hold_grant(q, p.rq.indirect_grefs[page])


cdef inline bint read_kept(backend_queue *q, pending *p, uint32_t page,
                           uint32_t size) noexcept nogil:
    """Copy the descriptors of a page that is mapped, and let it go; False if there was no room to
    map it in: a grant copy may do (see `copy_instead`)."""
    cdef uint32_t number = p.room.held[page]
    cdef uint8_t *at = q.kept.grants[number].page
    cdef bint may_copy = not q.grants.unmaps_at_once or is_shortage(q.kept.grants[number].status)
    if at != NULL:
        xvd_copy_slot(p.room.descriptors + page * XEN_PAGE_SIZE, at, size)
    elif not may_copy:
        p.refusal = REFUSAL_BAD_GRANT
    release_grant(&q.kept, number, q.now_ns)
    return at != NULL or not may_copy


cdef inline void read_descriptors(backend_queue *q, pending *p, uint32_t *n) noexcept nogil:
    """Copy a request's descriptors as far as its segments fill the pages, or describe the copy."""
    cdef uint32_t page, size, left = p.rq.nr_segments * q.ring.layout.segment_size
    cdef grant_copy *op
    for page in range(pages_of(&p.rq)):
        size = min(left, <uint32_t>XEN_PAGE_SIZE)
        left -= size
        if q.persistent and p.room.held[page] != NOBODY and read_kept(q, p, page, size):
            continue
        op = next_copy(q, p, n)
        op.local = p.room.descriptors + page * XEN_PAGE_SIZE
        op.gref = p.rq.indirect_grefs[page]
        op.offset = 0
        op.size = size
        op.to_grant = 0


cdef inline void judge_descriptors(backend_queue *q, pending *p) noexcept nogil:
    if p.refusal == REFUSAL_NONE:
        parse_segments(p.room.descriptors, q.ring.layout, p.rq.nr_segments, &p.rq)
        p.refusal = <uint8_t>check_data(&p.rq, &q.limits)


cdef inline void fetch_indirect(backend_queue *q) noexcept nogil:
    """Give the batch's indirect requests their segments, by one copy; mark those that are bad."""
    cdef uint32_t i, n = 0
    if q.persistent:
        for i in range(q.nr_batch):
            if q.batch[i].rq.indirect:
                hold_descriptors(q, q.batch[i])
        map_fresh(q)
    for i in range(q.nr_batch):
        if q.batch[i].rq.indirect:
            read_descriptors(q, q.batch[i], &n)
    run_copies(q, n)
    for i in range(q.nr_batch):
        if q.batch[i].rq.indirect:
            judge_descriptors(q, q.batch[i])
