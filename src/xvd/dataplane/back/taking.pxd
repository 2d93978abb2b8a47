# SPDX-License-Identifier: Apache-2.0
# Inline header of dataplane/back/.
"""The first stage of a request: off the ring once, judged, and into the batch; and what is begun
again, of a predecessor's or put back."""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from xvd.dataplane.abi cimport (
    BLKIF_DISCARD_SECURE, BLKIF_OP_WRITE_BARRIER, BLKIF_SECTOR_SIZE, REFUSAL_NONE,
    blkif_operation, blkif_operations)
from xvd.dataplane.back.buffers cimport reuse
from xvd.dataplane.back.journal cimport (
    ENTRY_ANSWERING, ENTRY_TAKEN, KIND_MASK, mark_taken, strike)
from xvd.dataplane.back.pending cimport (
    BEGINNING, RECOVERED, TAKING_OVER, backend_queue, pending)
from xvd.dataplane.back.request cimport parse, request, validate
from xvd.dataplane.back.space cimport take_space
from xvd.dataplane.back.storage cimport refuse, use_space
from xvd.dataplane.back.throttle cimport THROTTLES, settle, spend, wait_for_all
from xvd.dataplane.c cimport xvd_exchange32
from xvd.dataplane.latency cimport count_kind
from xvd.dataplane.ports cimport ENGINE_SECURE, PAGES_EACH
from xvd.dataplane.ring.ring cimport (
    RING_BROKEN, back_peek, back_pending, back_respond, back_take)


cdef inline bint may_begin(backend_queue *q, const request *rq) noexcept nogil:
    """Whether a request that was found good can be begun now, or has to wait for others.

    A barrier waits for all before it, and all after it wait for the barrier, on this ring: nothing
    orders two rings of a disk (Linux 29bde093).
    """
    if q.barrier != NULL or rq.operation == BLKIF_OP_WRITE_BARRIER and q.in_flight:
        return False
    return not rq.indirect or q.large.nr_free > 0


cdef inline int judge(backend_queue *q, pending *p) noexcept nogil:
    """Parse the private copy of a slot and find the first reason to refuse it."""
    parse(p.entry.slot, q.ring.layout, &p.rq)
    return validate(&p.rq, &q.limits)


cdef inline bint forget_limits(backend_queue *q) noexcept nogil:
    """Start anew if there are other limits than those that credits are of."""
    if not q.limits_changed or not xvd_exchange32(&q.limits_changed, 0):
        return False
    memset(q.credits, 0, sizeof(q.credits))
    return True


cdef inline bint is_due(backend_queue *q, pending *p, int refusal) noexcept nogil:
    """Whether the limits let a request through now; otherwise nothing is taken until they do."""
    cdef const request *rq = &p.rq
    cdef uint64_t until = 0
    cdef uint32_t i
    p.charged = rq.indirect and refusal == REFUSAL_NONE
    if refusal != REFUSAL_NONE:
        return True
    forget_limits(q)
    for i in range(<uint32_t>THROTTLES):
        if q.throttles[i] != NULL:
            until = max(until, wait_for_all(q.throttles[i], q.credits[i], rq, q.now_ns))
    if until:
        q.resume_ns = until
        q.count.throttled += 1
        return False
    for i in range(<uint32_t>THROTTLES):
        if q.throttles[i] != NULL:
            spend(q.throttles[i], q.credits[i], rq)
    return True


cdef inline void give_back_tokens(backend_queue *q) noexcept nogil:
    """Of the batch's indirect requests, whose segments are known now."""
    cdef uint32_t i, k
    cdef pending *p
    for k in range(q.nr_batch):
        p = q.batch[k]
        if not p.charged:
            continue
        p.charged = 0
        for i in range(<uint32_t>THROTTLES):
            if q.throttles[i] != NULL:
                settle(q.throttles[i], q.credits[i], &p.rq)


cdef inline uint32_t take(backend_queue *q, uint32_t budget) noexcept nogil:
    """Copy and judge new requests; those accepted are in `batch`. How many were taken.

    One that has to wait stays on the ring, and all behind it: they are looked at again when
    something has been answered.
    """
    cdef uint32_t count, i, taken = 0, pages = 0
    cdef int refusal
    cdef bint again = q.stalled, limited = q.throttling
    cdef pending *p
    q.stalled = 0
    if back_pending(&q.ring, &count) == RING_BROKEN:
        q.broken = 1
        return 0
    count = min(count, budget, q.nr_free)
    for i in range(count):
        p = q.free_list[q.nr_free - 1]
        back_peek(&q.ring, p.entry.slot)
        refusal = judge(q, p)
        if refusal == REFUSAL_NONE and not may_begin(q, &p.rq):
            q.stalled = 1
            q.count.oo_req += not again
            break
        if limited and not is_due(q, p, refusal):
            break
        q.nr_free -= 1
        p.entry.index = back_take(&q.ring)
        mark_taken(q.journal, p.entry, q.ring.req_cons)
        begin(q, p, refusal)
        taken += 1
        pages += p.rq.nr_segments
        if pages >= budget * PAGES_EACH:
            break
    q.count.requests += taken
    return taken


cdef inline void begin(backend_queue *q, pending *p, int refusal) noexcept nogil:
    """Into the batch with a request, or refuse it."""
    q.in_flight += 1
    p.begun_ns = q.now_ns
    p.mapped = p.holding = p.refusal = p.starved = 0
    p.copying = q.copying
    if p.rq.indirect and refusal == REFUSAL_NONE:
        use_space(p, take_space(&q.large))
    reuse(q, p.room)
    if refusal != REFUSAL_NONE:
        refuse(q, p, refusal)
        return
    if p.rq.operation == BLKIF_OP_WRITE_BARRIER:
        q.barrier = p
    q.batch[q.nr_batch] = p
    q.nr_batch += 1
    q.nr_indirect += p.rq.indirect


cdef inline void take_over(backend_queue *q) noexcept nogil:
    """Read a predecessor's journal: finish the answer it was at, and find what is to be executed.

    At most one entry can be between two stores of `take`, and one between two of `respond`; the
    indices tell on which side.
    """
    cdef uint32_t i
    cdef pending *p
    for i in range(q.ring.nr_ents):
        p = &q.pendings[i]
        if p.entry.word & KIND_MASK == ENTRY_ANSWERING:
            if p.entry.rsp_index == q.ring.rsp_prod_pvt:
                parse(p.entry.slot, q.ring.layout, &p.rq)
                back_respond(&q.ring, p.rq.id, p.rq.operation, p.entry.status)
            strike(q.journal, p.entry, q.ring.rsp_prod_pvt)
    q.nr_free = 0
    for i in range(q.ring.nr_ents):
        p = &q.pendings[i]
        p.waiting = p.entry.word & KIND_MASK == ENTRY_TAKEN
        if not p.waiting:
            q.free_list[q.nr_free] = p
            q.nr_free += 1
    q.unpushed += 1


cdef inline void recover(backend_queue *q) noexcept nogil:
    """Execute again what a predecessor left. That is right: the frontend was not told of any of it.

    An indirect request's pages are read again, and judged again: they may hold something else now.
    """
    cdef uint32_t i
    cdef int refusal
    cdef pending *p
    if q.recovering == TAKING_OVER:
        take_over(q)
    q.recovering = RECOVERED
    for i in range(q.ring.nr_ents):
        p = &q.pendings[i]
        if not p.waiting:
            continue
        refusal = judge(q, p)
        if refusal == REFUSAL_NONE and not may_begin(q, &p.rq):
            q.recovering = BEGINNING
            q.stalled = 1
            continue
        p.waiting = p.charged = 0
        q.count.requests += 1
        q.count.recovered += 1
        begin(q, p, refusal)


cdef inline void prepare(pending *p) noexcept nogil:
    """Fill in what the engine will be asked; where the data lies is known after `resolve`."""
    cdef const blkif_operation *row = &blkif_operations[p.rq.operation]
    p.to_ask = row.nr_asked - 1 if p.rq.nr_segments else 0
    p.io.op = row.asked[0]
    p.io.flags = ENGINE_SECURE if p.rq.flag & BLKIF_DISCARD_SECURE else 0
    p.io.owner = p
    p.io.iov = p.room.iov
    p.io.iovcnt = 0
    p.io.offset = p.rq.sector_number * BLKIF_SECTOR_SIZE
    p.io.length = p.rq.nr_sectors * BLKIF_SECTOR_SIZE


cdef inline void admit(backend_queue *q) noexcept nogil:
    """Count and prepare what has been judged for good."""
    cdef uint32_t i
    cdef pending *p
    if q.throttling and q.nr_indirect:
        give_back_tokens(q)
    for i in range(q.nr_batch):
        p = q.batch[i]
        count_kind(&q.kinds, blkif_operations[p.rq.operation].kind, p.rq.nr_sectors)
        prepare(p)
