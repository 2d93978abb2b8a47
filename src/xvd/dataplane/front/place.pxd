# SPDX-License-Identifier: Apache-2.0
# Inline header of dataplane/front/.
"""Operations whose data lies in granted pages from beginning to end, so that nothing copies it.

The pages are the pool's and stay granted: only persistent grants can be used so. An operation takes
them before it is submitted and keeps them after its end, until whoever has it gives them back. That
may be long, so all operations in place together get half of the pool at most, and never what the
largest request of the others needs. Where the backend is not trusted everything is copied, as a
page may hold what is not data.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from posix.uio cimport iovec

from xvd.dataplane.abi cimport XEN_PAGE_SIZE
from xvd.dataplane.front.issue cimport pages_for
from xvd.dataplane.front.pool cimport give_pages, page_data, page_pool, take_chain
from xvd.dataplane.front.queue cimport front_queue
from xvd.dataplane.ports cimport front_io


cdef inline uint32_t in_place_most(const front_queue *q) noexcept nogil:
    """Pages that operations may have their data in."""
    cdef uint32_t count = q.pool.ports.count
    if not q.pool.persistent or q.wipe or count < q.unit_pages:
        return 0
    return min(count // 2, count - q.unit_pages)


cdef inline bint place(front_queue *q, front_io *io) noexcept nogil:
    """Pages for the data of a read or write; False if there are too few."""
    cdef uint32_t count = pages_for(io.nr_sectors)
    if q.pool.in_place + count > q.pool.in_place_max or count > q.pool.nr_free:
        return False
    io.first_page = io.queue.next_page = take_chain(&q.pool, count, False)
    io.in_place = count
    q.pool.in_place += count
    return True


cdef inline void displace(front_queue *q, front_io *io) noexcept nogil:
    """Give them back; nothing of the operation may be on the ring."""
    give_pages(&q.pool, io.first_page, io.in_place)
    q.pool.in_place -= io.in_place
    io.in_place = 0


cdef inline uint32_t parts_of(const page_pool *p, const front_io *io, uint64_t offset,
                              uint64_t size, iovec *parts, uint32_t room) noexcept nogil:
    """The bytes from `offset` on, `size` of them unless `room` ends before; neighbours are one."""
    cdef uint32_t page = io.first_page, i, n = 0, within = offset % XEN_PAGE_SIZE
    cdef uint64_t here
    cdef uint8_t *at
    for i in range(<uint32_t>(offset // XEN_PAGE_SIZE)):
        page = p.next[page]
    while size:
        at = page_data(p, page) + within
        here = min(<uint64_t>XEN_PAGE_SIZE - within, size)
        if n and <uint8_t *>parts[n - 1].iov_base + parts[n - 1].iov_len == at:
            parts[n - 1].iov_len += here
        elif n == room:
            return n
        else:
            parts[n].iov_base = at
            parts[n].iov_len = here
            n += 1
        size -= here
        within = 0
        page = p.next[page]
    return n
