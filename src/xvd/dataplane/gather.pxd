# SPDX-License-Identifier: Apache-2.0
"""Where a request's data lies: its grants mapped, or its data copied, for a whole step's requests
by one call."""

from libc.stdint cimport uint8_t, uint32_t
from posix.uio cimport iovec

from xvd.dataplane.abi cimport (BLKIF_OP_READ, BLKIF_PAGE_SIZE, BLKIF_SECTOR_SIZE,
                                REFUSAL_BAD_GRANT)
from xvd.dataplane.answer cimport refuse
from xvd.dataplane.pending cimport COPIES, backend_queue, pending
from xvd.dataplane.ports cimport grant_copy


cdef inline void add_data(pending *p, uint8_t *at, size_t size) noexcept nogil:
    """Append to the transfer; what touches the part before joins it."""
    cdef iovec *last
    if p.io.iovcnt:
        last = &p.io.iov[p.io.iovcnt - 1]
        if <uint8_t *>last.iov_base + last.iov_len == at:
            last.iov_len += size
            return
    p.io.iov[p.io.iovcnt].iov_base = at
    p.io.iov[p.io.iovcnt].iov_len = size
    p.io.iovcnt += 1


cdef inline void drop_failed(backend_queue *q) noexcept nogil:
    """Refuse those of the batch whose grants could not be had (marked by `mapped` 2)."""
    cdef uint32_t i, kept = 0
    for i in range(q.nr_batch):
        if q.batch[i].mapped == 2:
            refuse(q, q.batch[i], REFUSAL_BAD_GRANT)
        else:
            q.batch[kept] = q.batch[i]
            kept += 1
    q.nr_batch = kept


cdef inline void map_batch(backend_queue *q) noexcept nogil:
    """Map the grants of the whole batch by one call; writable only what the storage writes to."""
    cdef uint32_t i, j, first, n = 0
    cdef pending *p
    for i in range(q.nr_batch):
        p = q.batch[i]
        if p.rq.nr_segments == 0:
            continue
        q.sets[n].grefs = p.rq.grefs
        q.sets[n].count = p.rq.nr_segments
        q.sets[n].writable = p.rq.operation == BLKIF_OP_READ
        q.owners[n] = p
        n += 1
    if n == 0:
        return
    q.grants.map(q.grants.ctx, q.sets, n)
    for i in range(n):
        p = q.owners[i]
        p.mapping = q.sets[i]
        p.mapped = 1 if p.mapping.status == 0 else 2
        if p.mapped == 2:
            continue
        q.count.mapped += p.mapping.count
        for j in range(p.rq.nr_segments):
            first = p.rq.first_sect[j] * BLKIF_SECTOR_SIZE
            add_data(p, p.mapping.base + j * BLKIF_PAGE_SIZE + first,
                     (p.rq.last_sect[j] - p.rq.first_sect[j] + 1) * BLKIF_SECTOR_SIZE)


cdef inline void run_copies(backend_queue *q, uint32_t n) noexcept nogil:
    """Copy; a request of which one piece fails is marked (`mapped` 2)."""
    cdef uint32_t i
    if n == 0:
        return
    q.grants.copy(q.grants.ctx, q.copies, n)
    q.count.copied += n
    for i in range(n):
        if q.copies[i].status != 0:
            q.owners[i].mapped = 2


cdef inline grant_copy *next_copy(backend_queue *q, pending *p, uint32_t *n) noexcept nogil:
    """One more piece of the next copy; when there is no room for it, the copy is made first."""
    if n[0] == COPIES:
        run_copies(q, n[0])
        n[0] = 0
    q.owners[n[0]] = p
    n[0] += 1
    return &q.copies[n[0] - 1]


cdef inline void add_copies(backend_queue *q, pending *p, uint32_t *n, bint to_grant) noexcept nogil:
    """Describe the copy between a request's segments and its bounce pages, packed."""
    cdef uint32_t j
    cdef uint8_t *at = p.room.bounce
    cdef grant_copy *op
    for j in range(p.rq.nr_segments):
        op = next_copy(q, p, n)
        op.local = at
        op.gref = p.rq.grefs[j]
        op.offset = p.rq.first_sect[j] * BLKIF_SECTOR_SIZE
        op.size = (p.rq.last_sect[j] - p.rq.first_sect[j] + 1) * BLKIF_SECTOR_SIZE
        op.to_grant = to_grant
        at += op.size


cdef inline void copy_batch(backend_queue *q) noexcept nogil:
    """Data of writes comes in now; reads go out in `collect`, and only when they succeeded."""
    cdef uint32_t i, n = 0
    cdef pending *p
    for i in range(q.nr_batch):
        p = q.batch[i]
        if p.rq.nr_segments == 0:
            continue
        add_data(p, p.room.bounce, p.io.length)
        if p.rq.operation != BLKIF_OP_READ:
            add_copies(q, p, &n, False)
    run_copies(q, n)


cdef inline void gather(backend_queue *q) noexcept nogil:
    if q.copying:
        copy_batch(q)
    else:
        map_batch(q)
    drop_failed(q)


cdef inline void copy_reads_out(backend_queue *q, uint32_t finished) noexcept nogil:
    cdef uint32_t i, n = 0
    for i in range(finished):
        if q.batch[i].rq.operation == BLKIF_OP_READ and q.batch[i].io.result == 0:
            add_copies(q, q.batch[i], &n, True)
    run_copies(q, n)


cdef inline void unmap_finished(backend_queue *q, uint32_t finished) noexcept nogil:
    """Before the responses become visible: a frontend that sees one takes its grant back at once,
    and must not find the page still mapped."""
    cdef uint32_t i, n = 0
    for i in range(finished):
        if q.batch[i].mapped == 1:
            q.sets[n] = q.batch[i].mapping
            q.batch[i].mapped = 0
            q.count.unmapped += q.sets[n].count
            n += 1
    if n:
        q.grants.unmap(q.grants.ctx, q.sets, n)
