# SPDX-License-Identifier: Apache-2.0
# Inline header of dataplane/front/.
"""From responses back to operations: each is checked against the shadow before it is believed.

A response names a request by its id and says how it ended; nothing else of it is used. Whatever is
not the one answer to a request in flight breaks the device.
"""

from libc.errno cimport EIO, EOPNOTSUPP
from libc.stdint cimport int16_t, int32_t, uint8_t, uint32_t, uint64_t
from posix.unistd cimport write

from xvd.dataplane.abi cimport (
    BLKIF_OP_INDIRECT, BLKIF_OP_READ, BLKIF_RSP_EOPNOTSUPP, BLKIF_RSP_OKAY, BLKIF_SECTOR_SIZE,
    BREACH_GRANT_STILL_MAPPED, BREACH_NONE, BREACH_NOT_IN_FLIGHT, BREACH_RESPONSE_OVERFLOW,
    BREACH_UNKNOWN_ID, BREACH_WRONG_OPERATION, blkif_layout, blkif_operations)
from xvd.dataplane.c cimport xvd_get16, xvd_get64
from xvd.dataplane.front.issue cimport move_data
from xvd.dataplane.front.pool cimport give_pages
from xvd.dataplane.front.queue cimport (
    SHADOW_FREE, SHADOW_IN_FLIGHT, append, front_queue, is_issued, pthread_mutex_lock,
    pthread_mutex_unlock, shadow)
from xvd.dataplane.latency cimport count_latency
from xvd.dataplane.ports cimport PAGES_EACH, front_io
from xvd.dataplane.ring.ring cimport RING_BROKEN, front_copy, front_pending


cdef inline void hand_over(front_queue *q, front_io *io) noexcept nogil:
    """The operation is over; the first of several rings the bell for all.

    A borrowed one stays in this thread, whose it is: no lock, and nobody else to be told.
    """
    cdef uint64_t one = 1
    cdef bint first
    if io.borrowed:
        append(&q.returned, io)
        return
    pthread_mutex_lock(&q.mutex)
    first = q.done.first == NULL
    append(&q.done, io)
    pthread_mutex_unlock(&q.mutex)
    if first:
        write(q.done_fd, &one, 8)


cdef inline int32_t worse(int32_t a, int32_t b) noexcept nogil:
    """Of two outcomes the graver: an error before "not supported" before success."""
    if a == 0 or (a == -EOPNOTSUPP and b != 0):
        return b
    return a


cdef inline int32_t outcome(int16_t status) noexcept nogil:
    """0 or -errno. NetBSD answers with raw errno values: what nobody knows is an error."""
    if status == BLKIF_RSP_OKAY:
        return 0
    return -EOPNOTSUPP if status == BLKIF_RSP_EOPNOTSUPP else -EIO


cdef inline void end_parts(front_queue *q, const shadow *s, int32_t error) noexcept nogil:
    """The request's part of each of its operations is over."""
    cdef front_io *io = s.io
    cdef front_io *following
    cdef uint64_t end = s.at + s.size, size
    while True:
        following = io.queue.follow
        size = io.nr_sectors * BLKIF_SECTOR_SIZE
        io.error = worse(io.error, error)
        io.queue.outstanding -= 1
        if io.queue.outstanding == 0 and is_issued(io):
            hand_over(q, io)
        if s.size == 0 or end <= size:
            return
        end -= size
        io = following


cdef inline int finish(front_queue *q, uint32_t id, int16_t status) noexcept nogil:
    """A checked response: the request is over."""
    cdef shadow *s = &q.shadows[id]
    cdef int32_t error = outcome(status)
    if error == 0 and s.operation == BLKIF_OP_READ and not s.in_place:
        move_data(q, s, False)
    if not s.in_place and not give_pages(&q.pool, s.first_page, s.nr_pages):
        return BREACH_GRANT_STILL_MAPPED
    if s.nr_indirect and not give_pages(&q.pool, s.first_indirect, s.nr_indirect):
        return BREACH_GRANT_STILL_MAPPED
    q.count.errors += error != 0
    count_latency(&q.latency, blkif_operations[s.operation].kind, q.now_ns - s.begun_ns)
    end_parts(q, s, error)
    s.state = SHADOW_FREE
    s.io = NULL
    q.free_ids[q.nr_free] = id
    q.nr_free += 1
    q.in_flight -= 1
    return BREACH_NONE


cdef inline int check(const front_queue *q, uint64_t id, uint8_t operation) noexcept nogil:
    cdef const shadow *s
    if id >= q.ring.nr_ents:
        return BREACH_UNKNOWN_ID
    s = &q.shadows[id]
    if s.state != SHADOW_IN_FLIGHT:
        return BREACH_NOT_IN_FLIGHT
    # An indirect request is answered with the inner operation; blkif.h does not say so.
    if operation != s.operation and not (s.nr_indirect and operation == BLKIF_OP_INDIRECT):
        return BREACH_WRONG_OPERATION
    return BREACH_NONE


cdef inline uint32_t take_responses(front_queue *q, uint32_t budget) noexcept nogil:
    """Those that are there by one look, within the budget; the first lie breaks the device."""
    cdef const blkif_layout *at = q.ring.layout
    cdef uint32_t count, i = 0, pages = 0
    cdef uint64_t id
    cdef int breach
    if front_pending(&q.ring, &count) == RING_BROKEN:
        q.broken = BREACH_RESPONSE_OVERFLOW
        return 0
    count = min(count, budget)
    while i < count and pages < budget * PAGES_EACH:
        front_copy(&q.ring, q.copy)
        id = xvd_get64(q.copy + at.response_id)
        breach = check(q, id, q.copy[at.response_operation])
        if breach == BREACH_NONE:
            breach = finish(q, <uint32_t>id, <int16_t>xvd_get16(q.copy + at.response_status))
        if breach != BREACH_NONE:
            q.broken = breach
            return i
        pages += q.shadows[id].nr_pages
        i += 1
    q.count.responses += i
    return i
