# SPDX-License-Identifier: Apache-2.0
# Inline header of dataplane/back/.
"""Unmapping persistent grants that are not worth keeping, a bounded number in each step."""

from libc.stdint cimport uint32_t

from xvd.dataplane.back.pending cimport backend_queue
from xvd.dataplane.back.persistent cimport next_to_purge, persistent_grant, scan


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
