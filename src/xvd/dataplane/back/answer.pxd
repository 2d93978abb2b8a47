# SPDX-License-Identifier: Apache-2.0
# Inline header of dataplane/back/.
"""The last stage of a request: its one response, and making responses visible together."""

from libc.stdint cimport int16_t

from xvd.dataplane.abi cimport BLKIF_RSP_OKAY, blkif_refusal_status
from xvd.dataplane.back.buffers cimport set_idle
from xvd.dataplane.back.journal cimport mark_answering, strike
from xvd.dataplane.back.pending cimport backend_queue, pending
from xvd.dataplane.back.space cimport give_space, space
from xvd.dataplane.c cimport DEBUG_ASSERT
from xvd.dataplane.ring.ring cimport back_push, back_respond


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


cdef inline void answer(backend_queue *q, pending *p, int16_t status) noexcept nogil:
    """The one place where a request gets its one response."""
    DEBUG_ASSERT(q.in_flight > 0)
    respond(q, p, status)
    q.count.responses += 1
    if status != BLKIF_RSP_OKAY:
        q.count.errors += 1
    q.in_flight -= 1
    if q.barrier == p:
        q.barrier = NULL
    q.unpushed += 1
    set_idle(q, p.room)
    if p.room != p.own:
        give_space(&q.large, p.room)
        use_space(p, p.own)
    q.free_list[q.nr_free] = p
    q.nr_free += 1


cdef inline void refuse(backend_queue *q, pending *p, int refusal) noexcept nogil:
    q.count.refusals[refusal] += 1
    answer(q, p, blkif_refusal_status[refusal])


cdef inline void publish_responses(backend_queue *q) noexcept nogil:
    if q.unpushed == 0:
        return
    q.unpushed = 0
    if back_push(&q.ring):
        q.count.notified += 1
        q.events.notify(q.events.ctx)
    else:
        q.count.suppressed += 1
