# SPDX-License-Identifier: Apache-2.0
# Inline header of dataplane/back/.
"""Memory that a queue keeps though nobody uses it: bounce pages of grant copy (Linux c6cc142d).

In blkback these are the free pages that requests map grants to. Here mapping takes address space
and gives it back with the mapping; what stays are the pages that data was copied through. Up to
`max_pages` of them are kept, because clearing a new page costs a fault; and none while memory is
short (Linux cb9369bd), when somebody needs them more. The free lists are stacks, so that those
given back first are the ones that were used last in time.
"""

from libc.stdint cimport uint32_t, uint64_t
from posix.mman cimport MADV_DONTNEED, madvise

from xvd.dataplane.abi cimport XEN_PAGE_SIZE
from xvd.dataplane.back.pending cimport backend_queue
from xvd.dataplane.back.space cimport space


cdef inline void set_idle(backend_queue *q, space *s) noexcept nogil:
    """A request is done with its pages; they stay where they are."""
    q.idle_pages += s.touched


cdef inline void reuse(backend_queue *q, space *s) noexcept nogil:
    """A request begins to use a space's pages again."""
    q.idle_pages -= s.touched


cdef inline void touch(space *s, uint64_t bytes_) noexcept nogil:
    """A request fills its pages so far."""
    cdef uint32_t pages = <uint32_t>((bytes_ + XEN_PAGE_SIZE - 1) // XEN_PAGE_SIZE)
    if pages > s.touched:
        s.touched = pages


cdef inline void drop(backend_queue *q, space *s) noexcept nogil:
    if s.touched:
        madvise(s.bounce, <size_t>s.touched * XEN_PAGE_SIZE, MADV_DONTNEED)
        q.idle_pages -= s.touched
        q.count.buffer_pages_released += s.touched
        s.touched = 0


cdef inline void shrink(backend_queue *q) noexcept nogil:
    """In each step: keep to the limit, which is none while the queue is squeezed."""
    cdef uint32_t i, most = 0 if q.now_ns < q.squeezed_until_ns else q.max_pages
    if q.idle_pages <= most:
        return
    for i in range(q.large.nr_free):
        if q.idle_pages <= most:
            return
        drop(q, q.large.free_list[i])
    for i in range(q.nr_free):
        if q.idle_pages <= most:
            return
        drop(q, q.free_list[i].own)
