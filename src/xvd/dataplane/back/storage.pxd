# SPDX-License-Identifier: Apache-2.0
# Inline header of dataplane/back/.
"""A request at the storage: handing it over, and taking what is finished to its response."""

from libc.errno cimport EOPNOTSUPP
from libc.stdint cimport uint32_t, uint64_t
from posix.unistd cimport write

from xvd.dataplane.abi cimport (
    BLKIF_FLAG_OPTIONAL, BLKIF_OFFER_SECURE, BLKIF_RSP_EOPNOTSUPP, BLKIF_RSP_ERROR, BLKIF_RSP_OKAY,
    REFUSAL_BAD_GRANT, blkif_operation, blkif_operations)
from xvd.dataplane.back.answer cimport answer, refuse
from xvd.dataplane.back.grants cimport give_back, pause
from xvd.dataplane.back.pending cimport backend_queue, pending
from xvd.dataplane.c cimport monotonic_ns, xvd_clear_bits
from xvd.dataplane.latency cimport count_latency
from xvd.dataplane.ports cimport ENGINE_SECURE, engine_io


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
        count_latency(&q.latency, blkif_operations[p.rq.operation].kind, q.now_ns - p.begun_ns)
        if p.failed:
            if p.starved:
                pause(q)
            refuse(q, p, REFUSAL_BAD_GRANT)
        elif p.io.result == 0:
            answer(q, p, BLKIF_RSP_OKAY)
        else:
            fail(q, p)
    return n
