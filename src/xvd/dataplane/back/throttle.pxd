# SPDX-License-Identifier: Apache-2.0
# Inline header of dataplane/back/.
"""Limits of requests and bytes a second, shared by any number of queues: token buckets.

A bucket is one number: when its next lease begins. A lease is some tokens, and takes as long as
they take to come at the bucket's rate; it may have begun in the past by as much as the bucket's
burst. A queue that lacks tokens takes the next lease, and takes nothing off its ring until that
begins. So each of several queues that wait has one lease, in turn, however large its requests are:
they share evenly. And what is touched by all of them is written once for many requests.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from xvd.dataplane.abi cimport (
    BLKIF_NR_KINDS, BLKIF_SECTOR_SIZE, BLKIF_SECTORS_PER_PAGE, blkif_operations)
from xvd.dataplane.back.request cimport request
from xvd.dataplane.c cimport xvd_cas64, xvd_load64

cdef extern from * nogil:
    int __builtin_ctz(unsigned int x)


cdef enum:
    THROTTLE_BUCKETS = 12        # {read, write, total} x {requests, bytes}, and each one's burst
    THROTTLES = 2                # of a queue: its disk's, and that of the group its disk is in

cdef struct bucket:
    uint64_t next_ns             # when the next lease begins; any thread moves it on
    uint64_t lease               # tokens of a lease
    uint64_t lease_ns            # how long they take to come
    uint64_t slack_ns            # how long before now a lease may have begun
    uint32_t bytes               # 1: a token is a byte; 0: a request

cdef struct throttle:
    uint32_t active[BLKIF_NR_KINDS]   # bit 1 << i: the bucket i counts requests of this kind
    uint64_t request_bytes       # a request of more counts as several; 0: not
    bucket buckets[THROTTLE_BUCKETS]

# What one queue has of one bucket.
cdef struct credit:
    int64_t tokens
    uint64_t begins_ns           # of a lease that it has taken and not yet had; 0: none


cdef inline uint64_t take_lease(bucket *b, uint64_t now) noexcept nogil:
    """When the next lease begins, or has begun; never 0."""
    cdef uint64_t earliest = now - b.slack_ns if now > b.slack_ns else 1
    cdef uint64_t before, begins
    while True:
        before = xvd_load64(&b.next_ns)
        begins = max(before, earliest)
        if xvd_cas64(&b.next_ns, before, begins + b.lease_ns):
            return begins


cdef inline uint64_t wait_for(bucket *b, credit *c, int64_t tokens, uint64_t now) noexcept nogil:
    """Until when there are not so many tokens; 0: there are."""
    while c.tokens < tokens:
        if c.begins_ns == 0:
            c.begins_ns = take_lease(b, now)
        if c.begins_ns > now:
            return c.begins_ns
        c.begins_ns = 0
        c.tokens += b.lease
    return 0


cdef inline int64_t tokens_of(const throttle *t, uint32_t i, uint64_t bytes) noexcept nogil:
    """What a request of so many bytes takes out of a bucket."""
    if t.buckets[i].bytes:
        return bytes
    if t.request_bytes == 0 or bytes == 0:
        return 1
    return (bytes + t.request_bytes - 1) // t.request_bytes


cdef inline uint64_t bytes_of(const request *rq) noexcept nogil:
    """Of its data; a discard has none. Of an indirect request the most that it may have: its
    segments are fetched later (`settle`)."""
    if rq.indirect:
        return <uint64_t>rq.nr_segments * (BLKIF_SECTORS_PER_PAGE * BLKIF_SECTOR_SIZE)
    return rq.nr_sectors * BLKIF_SECTOR_SIZE if rq.nr_segments else 0


cdef inline uint64_t wait_for_all(throttle *t, credit *credits, const request *rq,
                                  uint64_t now) noexcept nogil:
    """Until when the request has to wait; 0: it need not."""
    cdef uint32_t i, left = t.active[blkif_operations[rq.operation].kind]
    cdef uint64_t until = 0
    while left:
        i = __builtin_ctz(left)
        left &= left - 1
        until = max(until, wait_for(&t.buckets[i], &credits[i], tokens_of(t, i, bytes_of(rq)), now))
    return until


cdef inline void spend(throttle *t, credit *credits, const request *rq) noexcept nogil:
    cdef uint32_t i, left = t.active[blkif_operations[rq.operation].kind]
    while left:
        i = __builtin_ctz(left)
        left &= left - 1
        credits[i].tokens -= tokens_of(t, i, bytes_of(rq))


cdef inline void settle(throttle *t, credit *credits, const request *rq) noexcept nogil:
    """Give back what an indirect request has not needed, now that its segments are known."""
    cdef uint32_t i, left = t.active[blkif_operations[rq.operation].kind]
    while left:
        i = __builtin_ctz(left)
        left &= left - 1
        credits[i].tokens += (tokens_of(t, i, bytes_of(rq))
                              - tokens_of(t, i, rq.nr_sectors * BLKIF_SECTOR_SIZE))


cdef class Throttle:
    cdef throttle t
    cdef uint32_t used           # bit 1 << i: the bucket i has given leases, or may have
