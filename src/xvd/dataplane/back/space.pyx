# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""The memory of the spaces: taken when a queue is made, given back when it ends."""

from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport calloc, free
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap)
from posix.uio cimport iovec

from xvd.dataplane.abi cimport XEN_PAGE_SIZE

cdef extern from "sys/mman.h" nogil:
    int MAP_NORESERVE


cdef size_t bounce_bytes(const space_pool *pool) noexcept nogil:
    return <size_t>pool.count * pool.size * XEN_PAGE_SIZE


cdef void carve(space_pool *pool, uint32_t number) noexcept nogil:
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


cdef bint open_pool(space_pool *pool, uint32_t count, uint32_t size) noexcept nogil:
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


cdef void close_pool(space_pool *pool) noexcept nogil:
    """Give the memory back; also what `open_pool` took before it failed."""
    if pool.bounce != NULL:
        munmap(pool.bounce, bounce_bytes(pool))
    free(pool.memory)
    free(pool.free_list)
    free(pool.spaces)
