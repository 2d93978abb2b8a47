# SPDX-License-Identifier: Apache-2.0
"""Indirect requests: their segments are fetched from granted pages, once, and judged as a copy.

The pages are the frontend's and may change while we look (XSA-155), so their bytes are copied to
private memory before the first of them is read. The copy is a grant copy even where data is mapped:
a few kilobytes cost less than mapping a page and shooting it down again.
"""

from libc.stdint cimport uint32_t

from xvd.dataplane.abi cimport (BLKIF_PAGE_SIZE, BLKIF_SEGMENTS_PER_INDIRECT_PAGE,
                                REFUSAL_BAD_GRANT, REFUSAL_NONE)
from xvd.dataplane.answer cimport refuse
from xvd.dataplane.gather cimport next_copy, run_copies
from xvd.dataplane.pending cimport backend_queue, pending
from xvd.dataplane.ports cimport grant_copy
from xvd.dataplane.request cimport check_data, parse_segments


cdef inline void add_descriptors(backend_queue *q, pending *p, uint32_t *n) noexcept nogil:
    """Describe the copy of a request's indirect pages, as far as its segments fill them."""
    cdef uint32_t page, left = p.rq.nr_segments, here
    cdef grant_copy *op
    for page in range((left + BLKIF_SEGMENTS_PER_INDIRECT_PAGE - 1)
                      // BLKIF_SEGMENTS_PER_INDIRECT_PAGE):
        here = min(left, <uint32_t>BLKIF_SEGMENTS_PER_INDIRECT_PAGE)
        op = next_copy(q, p, n)
        op.local = p.room.descriptors + page * BLKIF_PAGE_SIZE
        op.gref = p.rq.indirect_grefs[page]
        op.offset = 0
        op.size = here * q.ring.layout.segment_size
        op.to_grant = 0
        left -= here


cdef inline int judge_descriptors(backend_queue *q, pending *p) noexcept nogil:
    if p.mapped == 2:
        return REFUSAL_BAD_GRANT
    parse_segments(p.room.descriptors, q.ring.layout, p.rq.nr_segments, &p.rq)
    return check_data(&p.rq, &q.limits)


cdef inline void fetch_indirect(backend_queue *q) noexcept nogil:
    """Give the batch's indirect requests their segments, by one copy; refuse those that are bad."""
    cdef uint32_t i, kept = 0, n = 0
    cdef int refusal
    cdef pending *p
    for i in range(q.nr_batch):
        if q.batch[i].rq.indirect:
            add_descriptors(q, q.batch[i], &n)
    run_copies(q, n)
    for i in range(q.nr_batch):
        p = q.batch[i]
        refusal = judge_descriptors(q, p) if p.rq.indirect else REFUSAL_NONE
        if refusal != REFUSAL_NONE:
            refuse(q, p, refusal)
            continue
        q.batch[kept] = p
        kept += 1
    q.nr_batch = kept
