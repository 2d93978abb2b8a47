# SPDX-License-Identifier: Apache-2.0
# Inline header of dataplane/back/.
"""The last stage of a request: the storage, its one response, and making responses visible
together."""

from libc.errno cimport (
    ECONNABORTED, EDQUOT, EIO, ENODEV, ENOLINK, ENOSPC, ENOTCONN, ENXIO, EOPNOTSUPP, ESHUTDOWN,
    ETIMEDOUT)
from libc.stdint cimport int16_t, int32_t, uint32_t, uint64_t
from posix.unistd cimport write

from xvd.dataplane.abi cimport (
    BLKIF_FLAG_OPTIONAL, BLKIF_OFFER_SECURE, BLKIF_RSP_EOPNOTSUPP, BLKIF_RSP_ERROR, BLKIF_RSP_OKAY,
    REFUSAL_NONE, blkif_operation, blkif_operations, blkif_refusal_status)
from xvd.dataplane.back.buffers cimport set_idle
from xvd.dataplane.back.grants cimport give_back, unmap
from xvd.dataplane.back.journal cimport mark_answering, strike
from xvd.dataplane.back.pending cimport (
    BEGINNING, HELD, PAUSE_NS, RUNNING, backend_queue, pending)
from xvd.dataplane.back.space cimport give_space, space
from xvd.dataplane.c cimport DEBUG_ASSERT, monotonic_ns, xvd_clear_bits
from xvd.dataplane.latency cimport count_latency, discount_kind
from xvd.dataplane.ports cimport ENGINE_SECURE, engine_io
from xvd.dataplane.ring.ring cimport back_push, back_respond


# ---- The response ----------------------------------------------------------------------------

cdef inline void use_space(pending *p, space *room) noexcept nogil:
    """Let a request's segments lie there."""
    p.room = room
    p.rq.grefs, p.rq.first_sect, p.rq.last_sect = room.grefs, room.first_sect, room.last_sect
    p.io.iov = room.iov


cdef inline void respond(backend_queue *q, pending *p, int16_t status) noexcept nogil:
    """Write the response and strike the request from the journal, in steps that can be resumed."""
    mark_answering(p.entry, q.ring.rsp_prod_pvt, status)
    back_respond(&q.ring, p.rq.id, p.rq.operation, status)
    strike(q.journal, p.entry, q.ring.rsp_prod_pvt)


cdef inline void leave(backend_queue *q, pending *p) noexcept nogil:
    """A request is no longer in flight."""
    DEBUG_ASSERT(q.in_flight > 0)
    q.in_flight -= 1
    if q.barrier == p:
        q.barrier = NULL
    set_idle(q, p.room)
    if p.room != p.own:
        give_space(&q.large, p.room)
        use_space(p, p.own)


cdef inline void answer(backend_queue *q, pending *p, int16_t status) noexcept nogil:
    """The one place where a request gets its one response."""
    respond(q, p, status)
    q.count.responses += 1
    if status != BLKIF_RSP_OKAY:
        q.count.errors += 1
    leave(q, p)
    q.unpushed += 1
    q.free_list[q.nr_free] = p
    q.nr_free += 1


cdef inline void pause(backend_queue *q) noexcept nogil:
    """Take nothing for a millisecond: what was short may be there then, and a frontend that sends
    the same again at once would make it no longer (blkback sleeps there)."""
    q.resume_ns = q.now_ns + PAUSE_NS
    q.count.starved += 1


cdef inline void refuse(backend_queue *q, pending *p, int refusal) noexcept nogil:
    q.count.refusals[refusal] += 1
    if p.starved:
        pause(q)
    answer(q, p, blkif_refusal_status[refusal])


cdef inline void refuse_marked(backend_queue *q) noexcept nogil:
    """Those of the batch that an earlier stage has found a reason against leave it."""
    cdef uint32_t i, kept = 0
    cdef pending *p
    for i in range(q.nr_batch):
        p = q.batch[i]
        if p.refusal == REFUSAL_NONE:
            q.batch[kept] = p
            kept += 1
        else:
            unmap(q, &p, 1)
            refuse(q, p, p.refusal)
    q.nr_batch = kept


cdef inline void publish_responses(backend_queue *q) noexcept nogil:
    if q.unpushed == 0:
        return
    q.unpushed = 0
    if back_push(&q.ring):
        q.count.notified += 1
        q.events.notify(q.events.ctx)
    else:
        q.count.suppressed += 1


# ---- The storage -----------------------------------------------------------------------------

cdef inline void start(backend_queue *q) noexcept nogil:
    cdef uint32_t i
    if q.nr_batch == 0:
        return
    for i in range(q.nr_batch):
        q.ios[i] = &q.batch[i].io
    q.engine.submit(q.engine.ctx, q.ios, q.nr_batch)


cdef inline void ring_alarm(backend_queue *q) noexcept nogil:
    """Let the control plane know: it can say something to somebody, this thread cannot."""
    cdef uint64_t one = 1
    if not q.alarmed:
        q.alarmed = 1
        write(q.alarm_fd, &one, 8)


cdef inline bint is_away(int32_t result) noexcept nogil:
    """Whether an error says that the storage is away or full, and may be there again."""
    return result in (-EIO, -ENOSPC, -EDQUOT, -ESHUTDOWN, -ETIMEDOUT, -ENOTCONN, -ECONNABORTED,
                      -ENOLINK, -ENODEV, -ENXIO)


cdef inline void put_back(backend_queue *q, pending *p) noexcept nogil:
    """Leave a request unanswered, in the journal as ever, and take no more: it is begun again, from
    the beginning and with whatever storage there is then, when the queue goes on."""
    q.last_error = p.io.result
    q.count.held += 1
    q.count.requests -= 1
    discount_kind(&q.kinds, blkif_operations[p.rq.operation].kind, p.rq.nr_sectors)
    leave(q, p)
    p.waiting = 1
    q.recovering = BEGINNING
    if q.halt == RUNNING:
        q.halt = HELD
    ring_alarm(q)


cdef inline void fail(backend_queue *q, pending *p) noexcept nogil:
    """The storage said no: the status for it.

    What it cannot do at all is offered no more, as blkback does for flush and barrier; a frontend
    that was told so falls back at once, and so does one that was not.
    """
    cdef uint32_t bit = <uint32_t>1 << p.rq.operation
    if p.io.result != -EOPNOTSUPP:
        q.last_error = p.io.result
        q.count.storage_errors += 1
        ring_alarm(q)
        answer(q, p, BLKIF_RSP_ERROR)
        return
    if p.io.flags & ENGINE_SECURE:
        bit = BLKIF_OFFER_SECURE
    if blkif_operations[p.rq.operation].flags & BLKIF_FLAG_OPTIONAL:
        q.withdrawn |= bit
        xvd_clear_bits(&q.limits.offered, bit)
        ring_alarm(q)
    answer(q, p, BLKIF_RSP_EOPNOTSUPP)


cdef inline bint go_on(backend_queue *q, pending *p) noexcept nogil:
    """Ask for what the request's operation asks for next; False if that was all."""
    cdef engine_io *io = &p.io
    cdef const blkif_operation *row = &blkif_operations[p.rq.operation]
    if io.result != 0 or p.to_ask == 0:
        return False
    io.op = row.asked[row.nr_asked - p.to_ask]
    p.to_ask -= 1
    q.engine.submit(q.engine.ctx, &io, 1)
    return True


cdef inline uint32_t collect(backend_queue *q) noexcept nogil:
    """Take what the engine has finished to its response. How many."""
    cdef uint32_t n = q.engine.reap(q.engine.ctx, q.ios, q.ring.nr_ents)
    cdef uint32_t i, finished = 0
    cdef pending *p
    if n and not q.given_time:
        q.now_ns = monotonic_ns()
    for i in range(n):
        p = <pending *>q.ios[i].owner
        if go_on(q, p):
            continue
        q.batch[finished] = p
        finished += 1
    give_back(q, finished)
    for i in range(finished):
        p = q.batch[i]
        if q.hold_errors and is_away(p.io.result) and p.refusal == REFUSAL_NONE:
            put_back(q, p)
            continue
        count_latency(&q.latency, blkif_operations[p.rq.operation].kind, q.now_ns - p.begun_ns)
        if p.refusal != REFUSAL_NONE:
            refuse(q, p, p.refusal)
        elif p.io.result == 0:
            answer(q, p, BLKIF_RSP_OKAY)
        else:
            fail(q, p)
    return n
