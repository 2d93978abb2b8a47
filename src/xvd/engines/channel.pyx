# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""The checking channel: what stands between any queue and any engine.

A queue has judged its requests by the rules of blkif; this judges every operation by the engine's
own, whoever asks, so that an engine never sees an impossible one.
"""

from libc.errno cimport EINVAL, EOPNOTSUPP, EROFS

from xvd.dataplane.abi cimport ENGINE_DISCARD, ENGINE_FLUSH, ENGINE_READ
from xvd.dataplane.ports cimport ENGINE_SECURE, engine_of, wrap


cdef int32_t verdict(const checked *c, const engine_io *io) noexcept nogil:
    if io.op == ENGINE_FLUSH:
        return 0
    if io.op > ENGINE_DISCARD or io.offset > c.size or io.length > c.size - io.offset:
        return -EINVAL
    if (io.offset | io.length) & c.block_mask:
        return -EINVAL
    if io.op != ENGINE_READ and c.read_only:
        return -EROFS
    if io.op == ENGINE_DISCARD:
        if not (c.can_secure_discard if io.flags & ENGINE_SECURE else c.can_discard):
            return -EOPNOTSUPP
    return 0


cdef void submit(void *ctx, engine_io **ios, uint32_t n) noexcept nogil:
    cdef checked *c = <checked *>ctx
    cdef uint32_t i, good = 0
    cdef int32_t result
    for i in range(n):
        result = verdict(c, ios[i])
        if result != 0 or (ios[i].op == ENGINE_DISCARD and ios[i].length == 0):
            finish(&c.done, ios[i], result)  # nothing is discarded, whatever storage says to it
        else:
            ios[good] = ios[i]
            good += 1
    if good:
        c.lower.submit(c.lower.ctx, ios, good)


cdef uint32_t reap(void *ctx, engine_io **out, uint32_t room) noexcept nogil:
    cdef checked *c = <checked *>ctx
    cdef uint32_t n = reap_list(&c.done, out, room)
    return n + c.lower.reap(c.lower.ctx, out + n, room - n)


cdef void attach(void *ctx, void *io_uring) noexcept nogil:
    cdef checked *c = <checked *>ctx
    c.lower.attach(c.lower.ctx, io_uring)


cdef int peek(void *ctx) noexcept nogil:
    cdef checked *c = <checked *>ctx
    return c.done.first != NULL or c.lower.peek(c.lower.ctx)


cdef int may_sleep(void *ctx) noexcept nogil:
    cdef checked *c = <checked *>ctx
    return c.done.first == NULL and c.lower.may_sleep(c.lower.ctx)


cdef class CheckedChannel:
    """`Channel` in front of another; made by `checked.Checked.open_channel`."""

    def __init__(self, lower, info):
        self.lower = lower
        self.c.lower = engine_of(lower)
        self.c.size = info.size
        self.c.block_mask = info.logical_block_size - 1
        self.c.read_only = info.read_only
        self.c.can_discard = info.can_discard
        self.c.can_secure_discard = info.can_secure_discard
        self.table.ctx = &self.c
        self.table.fd = self.c.lower.fd
        self.table.submit = submit
        self.table.reap = reap
        self.table.attach = attach
        if self.c.lower.peek != NULL:
            self.table.peek = peek
        if self.c.lower.may_sleep != NULL:
            self.table.may_sleep = may_sleep

    @property
    def ports(self):
        """Capsule ``xvd.engine_ports``."""
        return wrap(&self.table, "xvd.engine_ports")

    def set_size(self, uint64_t size):
        """Check by another size from now on, in bytes. Any thread."""
        self.c.size = size

    def close(self):
        """Close the channel behind."""
        self.lower.close()
