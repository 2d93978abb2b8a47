# SPDX-License-Identifier: Apache-2.0
"""Room for the segments of requests, all of it taken when the queue is made.

Every request has room for the eleven segments of a slot. An indirect one takes a larger space from
a pool, which is smaller than the ring where segments are many: the memory of a queue must not grow
with a product of two numbers that a frontend may choose. When the pool is empty the next indirect
request stays on the ring until one is given back.
"""

from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport calloc, free
from posix.mman cimport (MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap,
                         munmap)
from posix.uio cimport iovec

from xvd.dataplane.abi cimport XEN_PAGE_SIZE

cdef extern from "sys/mman.h" nogil:
    int MAP_NORESERVE


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


cdef inline size_t bounce_bytes(const space_pool *pool) noexcept nogil:
    return <size_t>pool.count * pool.size * XEN_PAGE_SIZE


cdef inline void carve(space_pool *pool, uint32_t number) noexcept nogil:
    """Lay out one space; each array is aligned because those before it are of larger items."""
    cdef space *s = &pool.spaces[number]
    cdef size_t first = <size_t>number * pool.size, every = <size_t>pool.count * pool.size
    cdef uint8_t *at = pool.memory
    s.iov = <iovec *>at + first
    at += every * sizeof(iovec)
    s.descriptors = at + first * 8
    at += every * 8
    s.grefs = <uint32_t *>at + first
    s.held = <uint32_t *>at + every + first
    s.passing = <uint32_t *>at + 2 * every + first
    at += every * 12
    s.first_sect = at + first
    s.last_sect = at + every + first
    s.bounce = pool.bounce + first * XEN_PAGE_SIZE
    pool.free_list[number] = s


cdef inline bint open_pool(space_pool *pool, uint32_t count, uint32_t size) noexcept nogil:
    """Take the memory of `count` spaces of `size` segments; False if there is none."""
    cdef uint32_t i
    cdef void *at
    pool.count, pool.size = count, size
    if count == 0:
        return True
    pool.spaces = <space *>calloc(count, sizeof(space))
    pool.free_list = <space **>calloc(count, sizeof(void *))
    pool.memory = <uint8_t *>calloc(<size_t>count * size, SEGMENT_BYTES)
    if not (pool.spaces and pool.free_list and pool.memory):
        return False
    at = mmap(NULL, bounce_bytes(pool), PROT_READ | PROT_WRITE,
              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    if at == MAP_FAILED:
        return False
    pool.bounce = <uint8_t *>at
    for i in range(count):
        carve(pool, i)
    pool.nr_free = count
    return True


cdef inline void close_pool(space_pool *pool) noexcept nogil:
    """Give the memory back; also what `open_pool` took before it failed."""
    if pool.bounce != NULL:
        munmap(pool.bounce, bounce_bytes(pool))
    free(pool.memory)
    free(pool.free_list)
    free(pool.spaces)


cdef inline space *take_space(space_pool *pool) noexcept nogil:
    pool.nr_free -= 1
    return pool.free_list[pool.nr_free]


cdef inline void give_space(space_pool *pool, space *s) noexcept nogil:
    pool.free_list[pool.nr_free] = s
    pool.nr_free += 1
