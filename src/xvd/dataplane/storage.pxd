# SPDX-License-Identifier: Apache-2.0
"""A request at the storage: handing it over, and taking what is finished to its response."""

from libc.errno cimport EOPNOTSUPP
from libc.stdint cimport int32_t, uint32_t, uint64_t
from posix.unistd cimport write

from xvd.dataplane.abi cimport (BLKIF_OP_READ, BLKIF_RSP_EOPNOTSUPP, BLKIF_RSP_ERROR,
                                BLKIF_RSP_OKAY, REFUSAL_BAD_GRANT)
from xvd.dataplane.answer cimport answer, refuse
from xvd.dataplane.gather cimport copy_reads_out, unmap_finished
from xvd.dataplane.pending cimport backend_queue, pending
from xvd.dataplane.ports cimport ENGINE_WRITE, engine_io


cdef inline void start(backend_queue *q) noexcept nogil:
    cdef uint32_t i
    if q.nr_batch == 0:
        return
    for i in range(q.nr_batch):
        q.ios[i] = &q.batch[i].io
    q.engine.submit(q.engine.ctx, q.ios, q.nr_batch)


cdef inline void alarm(backend_queue *q, int32_t error) noexcept nogil:
    """Let the control plane know that storage fails: it can say so, this thread cannot."""
    cdef uint64_t one = 1
    q.last_error = error
    q.count.storage_errors += 1
    if not q.alarmed:
        q.alarmed = 1
        write(q.alarm_fd, &one, 8)


cdef inline void restart_as_write(backend_queue *q, pending *p) noexcept nogil:
    """A flush with data: what was written before is durable now, so the data may follow."""
    cdef engine_io *io = &p.io
    p.second_stage = 0
    io.op = ENGINE_WRITE
    q.engine.submit(q.engine.ctx, &io, 1)


cdef inline uint32_t collect(backend_queue *q) noexcept nogil:
    """Take what the engine has finished to its response. How many."""
    cdef uint32_t n = q.engine.reap(q.engine.ctx, q.ios, q.ring.nr_ents)
    cdef uint32_t i, finished = 0
    cdef pending *p
    for i in range(n):
        p = <pending *>q.ios[i].owner
        if p.second_stage and p.io.result == 0:
            restart_as_write(q, p)
            continue
        q.batch[finished] = p
        finished += 1
    if q.copying:
        copy_reads_out(q, finished)
    else:
        unmap_finished(q, finished)
    for i in range(finished):
        p = q.batch[i]
        if p.mapped == 2:
            refuse(q, p, REFUSAL_BAD_GRANT)
        elif p.io.result == 0:
            answer(q, p, BLKIF_RSP_OKAY)
        elif p.io.result == -EOPNOTSUPP:
            answer(q, p, BLKIF_RSP_EOPNOTSUPP)
        else:
            alarm(q, p.io.result)
            answer(q, p, BLKIF_RSP_ERROR)
    return n
