# SPDX-License-Identifier: Apache-2.0
# Inline header of dataplane/back/.
"""Leaving a ring to a successor though the storage still has requests, and may never end them.

What is mapped for those is replaced by memory of our own, at the same addresses: whatever the
storage does there late, no page of the frontend's sees it. The requests stay in the journal, and
the successor executes them. This queue then only waits for the storage, as long as that takes.
"""

from libc.stdint cimport uint32_t
from posix.mman cimport munmap

from xvd.dataplane.abi cimport (
    STEP_DRAINED, STEP_LEFT, STEP_WORKED, blkif_operations)
from xvd.dataplane.back.grants cimport purge_all
from xvd.dataplane.back.journal cimport ENTRY_TAKEN, KIND_MASK
from xvd.dataplane.back.pending cimport backend_queue, pending
from xvd.dataplane.back.persistent cimport persistent_grant
from xvd.dataplane.back.request cimport reads_disk
from xvd.dataplane.c cimport xvd_store_release
from xvd.dataplane.latency cimport discount_kind
from xvd.dataplane.ports cimport event_ports


cdef inline bint is_begun(const pending *p) noexcept nogil:
    """Whether the storage has a request."""
    return p.entry.word & KIND_MASK == ENTRY_TAKEN and not p.waiting


cdef inline bint is_pinned(const backend_queue *q) noexcept nogil:
    """Whether the storage reads into pages of the frontend's. Any thread, while nothing is taken:
    there can only be fewer of them."""
    cdef uint32_t i
    cdef const pending *p
    for i in range(q.ring.nr_ents):
        p = &q.pendings[i]
        if is_begun(p) and not p.copying and reads_disk(&p.rq):
            return True
    return False


cdef inline void discount(backend_queue *q) noexcept nogil:
    """The successor counts what it executes."""
    cdef uint32_t i
    cdef pending *p
    for i in range(q.ring.nr_ents):
        p = &q.pendings[i]
        if is_begun(p):
            q.count.requests -= 1
            discount_kind(&q.kinds, blkif_operations[p.rq.operation].kind, p.rq.nr_sectors)


cdef inline void replace_pages(backend_queue *q) noexcept nogil:
    """Let the frontend have all its pages back."""
    cdef uint32_t i
    cdef pending *p
    cdef persistent_grant *g
    for i in range(q.ring.nr_ents):
        p = &q.pendings[i]
        if p.mapped:
            q.grants.replace(q.grants.ctx, &p.mapping, 1)
            q.count.unmapped += p.mapping.count
    if not q.persistent:
        return
    purge_all(q)
    for i in range(q.kept.capacity):
        g = &q.kept.grants[i]
        if g.users:
            q.sets[0].grefs = &g.gref
            q.sets[0].count = 1
            q.sets[0].base, q.sets[0].handle = g.page, g.handle
            q.grants.replace(q.grants.ctx, q.sets, 1)
            q.count.unmapped += 1
            q.kept.count -= 1


cdef inline void free_pages(backend_queue *q) noexcept nogil:
    """Of what `replace_pages` left in their places."""
    cdef uint32_t i
    cdef pending *p
    for i in range(q.ring.nr_ents):
        p = &q.pendings[i]
        if p.mapped:
            p.mapped = 0
            munmap(p.mapping.base, <size_t>p.mapping.count * q.grants.stride)
    if not q.persistent:
        return
    for i in range(q.kept.capacity):
        if q.kept.grants[i].users:
            q.kept.grants[i].users = 0
            munmap(q.kept.grants[i].page, q.grants.stride)


cdef inline uint32_t leave_ring(backend_queue *q, event_ports *nowhere) noexcept nogil:
    """A step of a queue that leaves its ring, or has left it; STEP_* flags.

    The first hands all back; with the next, when the thread hears of no event any more, it has
    left. nowhere: a channel on which there are none.
    """
    cdef uint32_t n
    if q.events != nowhere:
        discount(q)
        replace_pages(q)
        q.events = q.table.events = nowhere
        q.table.peek = NULL
        return STEP_LEFT
    xvd_store_release(&q.has_left, 1)
    n = q.engine.reap(q.engine.ctx, q.ios, q.ring.nr_ents)
    q.in_flight -= n
    if q.in_flight == 0:
        free_pages(q)
        return STEP_DRAINED
    return STEP_WORKED if n else 0
