# SPDX-License-Identifier: Apache-2.0
# Inline header of dataplane/back/.
"""Where a request's data lies: its grants mapped, or its data copied, for a whole step's requests
by one call; and giving back what was mapped, at once or when it is not worth keeping any more."""

from libc.stdint cimport int32_t, uint8_t, uint32_t
from posix.uio cimport iovec

from xvd.dataplane.abi cimport (
    BLKIF_SECTOR_SIZE, GNTST_NO_DEVICE_SPACE, GNTST_NO_SPACE, REFUSAL_BAD_GRANT, REFUSAL_NONE)
from xvd.dataplane.back.buffers cimport touch
from xvd.dataplane.back.pending cimport COPIES, backend_queue, pending
from xvd.dataplane.back.persistent cimport (
    NOBODY, find, hold, keep, next_to_purge, persistent_grant, release_grant, scan)
from xvd.dataplane.back.request cimport reads_disk
from xvd.dataplane.ports cimport grant_copy


cdef inline bint is_shortage(int32_t status) noexcept nogil:
    """Whether a machine has no room, or no memory, for one more mapping or copy."""
    return status == GNTST_NO_SPACE or status == GNTST_NO_DEVICE_SPACE


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


# ---- Persistent grants -----------------------------------------------------------------------

cdef inline void map_fresh(backend_queue *q) noexcept nogil:
    """Map what is to be kept, each page by itself: it is unmapped by itself one day.

    Always writable, whatever this request does: the next one may read into the same page.
    """
    cdef uint32_t i
    cdef persistent_grant *g
    for i in range(q.nr_fresh):
        q.sets[i].grefs = &q.kept.grants[q.fresh[i]].gref
        q.sets[i].count = 1
        q.sets[i].writable = 1
    if q.nr_fresh:
        q.count.map_calls += 1
        q.grants.map(q.grants.ctx, q.sets, q.nr_fresh)
    for i in range(q.nr_fresh):
        g = &q.kept.grants[q.fresh[i]]
        g.status = q.sets[i].status
        if g.status == 0:
            g.page, g.handle = q.sets[i].base, q.sets[i].handle
            q.count.mapped += 1
    q.nr_fresh = 0


cdef inline uint32_t hold_grant(backend_queue *q, uint32_t gref) noexcept nogil:
    """Use a reference's persistent grant, or begin one, to be mapped by `map_fresh`; or NOBODY."""
    cdef uint32_t number = find(&q.kept, gref)
    if number != NOBODY:
        q.count.persistent_hits += 1
        hold(&q.kept, number)
        return number
    q.count.persistent_misses += 1
    number = keep(&q.kept, gref)
    if number == NOBODY:
        return NOBODY
    if q.nr_fresh == q.nr_sets:
        map_fresh(q)
    q.fresh[q.nr_fresh] = number
    q.nr_fresh += 1
    return number


cdef inline void hold_segments(backend_queue *q, pending *p) noexcept nogil:
    """Use what is kept for a request's segments; the rest is mapped for this request only."""
    cdef uint32_t j
    p.holding = 1
    p.passing = 0
    for j in range(p.rq.nr_segments):
        p.room.held[j] = hold_grant(q, p.rq.grefs[j])
        if p.room.held[j] == NOBODY:
            p.room.passing[p.passing] = p.rq.grefs[j]
            p.passing += 1


cdef inline void release_segments(backend_queue *q, pending *p) noexcept nogil:
    cdef uint32_t j
    p.holding = 0
    for j in range(p.rq.nr_segments):
        if p.room.held[j] != NOBODY:
            release_grant(&q.kept, p.room.held[j], q.now_ns)


# ---- Mapping ---------------------------------------------------------------------------------

cdef inline void map_passing(backend_queue *q) noexcept nogil:
    """Map what is for one request only, by one call; writable only what the storage writes to."""
    cdef uint32_t i, n = 0
    cdef pending *p
    for i in range(q.nr_batch):
        p = q.batch[i]
        if p.passing == 0:
            continue
        q.sets[n].grefs = p.room.passing if q.persistent else p.rq.grefs
        q.sets[n].count = p.passing
        q.sets[n].writable = reads_disk(&p.rq)
        q.owners[n] = p
        n += 1
    if n == 0:
        return
    q.count.map_calls += 1
    q.grants.map(q.grants.ctx, q.sets, n)
    for i in range(n):
        p = q.owners[i]
        p.mapping = q.sets[i]
        if p.mapping.status == 0:
            p.mapped = 1
            q.count.mapped += p.mapping.count
        else:
            p.refusal = REFUSAL_BAD_GRANT
            p.starved |= is_shortage(p.mapping.status)


cdef inline void find_data(backend_queue *q, pending *p) noexcept nogil:
    """Put a request's segments together from wherever each of them is mapped."""
    cdef uint32_t j, first, passing = 0
    cdef uint8_t *page
    for j in range(p.rq.nr_segments):
        if p.holding and p.room.held[j] != NOBODY:
            page = q.kept.grants[p.room.held[j]].page
            if page == NULL:
                p.starved |= is_shortage(q.kept.grants[p.room.held[j]].status)
        else:
            page = p.mapping.base + <size_t>passing * q.grants.stride
            passing += 1
        if page == NULL:
            p.refusal = REFUSAL_BAD_GRANT
            return
        first = p.rq.first_sect[j] * BLKIF_SECTOR_SIZE
        add_data(p, page + first,
                 (p.rq.last_sect[j] - p.rq.first_sect[j] + 1) * BLKIF_SECTOR_SIZE)


cdef inline void copy_instead(pending *p) noexcept nogil:
    """What could not be mapped may still be copied: it may be this process that has no room, for
    Linux allows it 65530 mappings (vm.max_map_count) and each grant that is kept is one.

    Linux's gntdev does not tell what was wrong, so with it that is tried whatever it was.
    """
    p.refusal = REFUSAL_NONE
    p.copying = 1
    p.io.iovcnt = 0


cdef inline void map_batch(backend_queue *q) noexcept nogil:
    """Map the grants of the whole batch.

    A frontend that sees a response takes its grant back, and disables itself if the page is still
    mapped (XSA-396): where unmapping takes its time, only what stays mapped may be mapped.
    """
    cdef uint32_t i
    cdef pending *p
    for i in range(q.nr_batch):
        p = q.batch[i]
        p.passing = p.rq.nr_segments
        if q.persistent:
            hold_segments(q, p)
        if p.passing and not q.grants.unmaps_at_once:
            p.passing = 0
            p.copying = 1
    map_fresh(q)
    map_passing(q)
    for i in range(q.nr_batch):
        p = q.batch[i]
        if p.refusal == REFUSAL_NONE and not p.copying:
            find_data(q, p)
        if p.refusal != REFUSAL_NONE and (p.starved or not q.grants.unmaps_at_once):
            copy_instead(p)


cdef inline void unmap(backend_queue *q, pending **whose, uint32_t count) noexcept nogil:
    """Give back what requests have mapped, before their responses become visible: a frontend that
    sees one takes its grant back at once, and must not find the page still mapped."""
    cdef uint32_t i, n = 0
    cdef pending *p
    for i in range(count):
        p = whose[i]
        if p.holding:
            release_segments(q, p)
        if p.mapped:
            p.mapped = 0
            q.sets[n] = p.mapping
            q.count.unmapped += p.mapping.count
            n += 1
    if n:
        q.count.unmap_calls += 1
        q.grants.unmap(q.grants.ctx, q.sets, n)


# ---- Copying ---------------------------------------------------------------------------------

cdef inline void run_copies(backend_queue *q, uint32_t n) noexcept nogil:
    """Copy; a request of which one piece fails is marked."""
    cdef uint32_t i
    if n == 0:
        return
    q.count.copy_calls += 1
    q.grants.copy(q.grants.ctx, q.copies, n)
    q.count.copied += n
    for i in range(n):
        if q.copies[i].status != 0:
            q.owners[i].refusal = REFUSAL_BAD_GRANT
            q.owners[i].starved |= is_shortage(q.copies[i].status)


cdef inline grant_copy *next_copy(backend_queue *q, pending *p, uint32_t *n) noexcept nogil:
    """One more piece of the next copy; when there is no room for it, the copy is made first."""
    if n[0] == COPIES:
        run_copies(q, n[0])
        n[0] = 0
    q.owners[n[0]] = p
    n[0] += 1
    return &q.copies[n[0] - 1]


cdef inline void add_copies(backend_queue *q, pending *p, uint32_t *n,
                            bint to_grant) noexcept nogil:
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
        if not p.copying or p.rq.nr_segments == 0:
            continue
        touch(p.room, p.io.length)
        add_data(p, p.room.bounce, p.io.length)
        if not reads_disk(&p.rq):
            add_copies(q, p, &n, False)
    run_copies(q, n)


cdef inline void copy_reads_out(backend_queue *q, uint32_t finished) noexcept nogil:
    cdef uint32_t i, n = 0
    cdef pending *p
    for i in range(finished):
        p = q.batch[i]
        if p.copying and reads_disk(&p.rq) and p.io.result == 0:
            add_copies(q, p, &n, True)
    run_copies(q, n)


# ---- Both ------------------------------------------------------------------------------------

cdef inline void resolve(backend_queue *q) noexcept nogil:
    """Resolve the grants of the batch; those whose grants could not be had are marked."""
    if not q.copying:
        map_batch(q)
    copy_batch(q)


cdef inline void give_back(backend_queue *q, uint32_t finished) noexcept nogil:
    """Data of reads goes out; the first `finished` of the batch let go of their pages."""
    copy_reads_out(q, finished)
    if not q.copying:
        unmap(q, q.batch, finished)


# ---- What is not worth keeping ----------------------------------------------------------------

cdef inline bint purge_some(backend_queue *q, bint all_of_them) noexcept nogil:
    """Unmap as many as one call takes; True if there may be more."""
    cdef uint32_t n = 0
    cdef persistent_grant *g
    while n < q.nr_sets:
        g = next_to_purge(&q.kept, q.now_ns, all_of_them)
        if g == NULL:
            break
        q.sets[n].grefs = &g.gref
        q.sets[n].count = 1
        q.sets[n].base, q.sets[n].handle = g.page, g.handle
        n += 1
    if n:
        q.count.unmap_calls += 1
        q.grants.unmap(q.grants.ctx, q.sets, n)
        q.count.unmapped += n
        q.count.persistent_purged += n
    return n == q.nr_sets


cdef inline bint purge(backend_queue *q) noexcept nogil:
    """In each step: purge what is due. True if there is more to be done at once."""
    scan(&q.kept, q.now_ns)
    return purge_some(q, False)


cdef inline void purge_all(backend_queue *q) noexcept nogil:
    """At the end: nothing stays mapped. Only when no request is in flight."""
    while purge_some(q, True):
        pass
