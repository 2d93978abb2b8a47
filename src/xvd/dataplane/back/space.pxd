# SPDX-License-Identifier: Apache-2.0
# Inline header of dataplane/back/.
"""Room for the segments of requests, all of it taken when the queue is made.

Every request has room for the eleven segments of a slot. An indirect one takes a larger space from
a pool, which is smaller than the ring where segments are many: the memory of a queue must not grow
with a product of two numbers that a frontend may choose. When the pool is empty the next indirect
request stays on the ring until one is given back.
"""

from libc.stdint cimport uint8_t, uint32_t
from posix.uio cimport iovec

cdef enum:
    LARGE_SEGMENTS = 16384       # in the large spaces of one queue: 64 MiB of data in flight
    SEGMENT_BYTES = sizeof(iovec) + 8 + 3 * 4 + 1 + 1

# Room for one request's segments.
cdef struct space:
    iovec *iov
    uint8_t *descriptors         # private copy of indirect pages
    uint32_t *grefs
    uint32_t *held               # number of the persistent grant that a segment uses, or NOBODY
    uint32_t *passing            # the references that are mapped for this request only
    uint8_t *first_sect
    uint8_t *last_sect
    uint8_t *bounce              # a page for each segment, for what is not mapped
    uint32_t touched             # of those, how many are in memory

cdef struct space_pool:
    uint32_t count
    uint32_t size                # segments in each
    space *spaces
    space **free_list
    uint32_t nr_free
    uint8_t *memory
    uint8_t *bounce              # address space; a page is there once it was used


cdef bint open_pool(space_pool *pool, uint32_t count, uint32_t size) noexcept nogil


cdef void close_pool(space_pool *pool) noexcept nogil


cdef inline space *take_space(space_pool *pool) noexcept nogil:
    pool.nr_free -= 1
    return pool.free_list[pool.nr_free]


cdef inline void give_space(space_pool *pool, space *s) noexcept nogil:
    pool.free_list[pool.nr_free] = s
    pool.nr_free += 1
