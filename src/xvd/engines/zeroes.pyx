# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""Writes of zeros are found and said to be such; what storage makes of that is its own matter.

Such a write stays a write to all that it passes: maps, mirrors and storage that knows nothing
better have it in its order, with its length and its errors. Its data is zeros of our own from here
on. The guest's pages are looked at once and then left alone, so that the storage has what was seen,
whatever the guest does to them meanwhile. Data in which a single byte is not zero goes on as it is.
"""

from libc.stdint cimport uint8_t, uint32_t
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, mmap

from xvd.dataplane.abi cimport (
    BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST, ENGINE_WRITE, XEN_PAGE_SIZE)
from xvd.dataplane.c cimport xvd_is_zero
from xvd.dataplane.ports cimport (
    ENGINE_UNMAP, ENGINE_ZEROES, engine_io, engine_of, engine_ports, wrap)

cdef extern from "sys/mman.h" nogil:
    int MAP_NORESERVE

cdef enum:
    # As much as one request has: no part of its data is longer.
    ZEROS = BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST * 512 * XEN_PAGE_SIZE


# Address space, behind all of which the kernel has one page.
cdef void *zeros = mmap(NULL, ZEROS, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
if zeros == MAP_FAILED:
    raise MemoryError("no address space for zeros")


cdef struct detecting:
    engine_ports *lower
    uint8_t flags                # of a write of zeros


cdef bint is_zeroes(const engine_io *io) noexcept nogil:
    cdef uint32_t i
    for i in range(io.iovcnt):
        if io.iov[i].iov_len > <size_t>ZEROS or not xvd_is_zero(io.iov[i].iov_base,
                                                                io.iov[i].iov_len):
            return False
    return io.length > 0


cdef void submit(void *ctx, engine_io **ios, uint32_t n) noexcept nogil:
    cdef detecting *d = <detecting *>ctx
    cdef uint32_t i, j
    for i in range(n):
        if ios[i].op == ENGINE_WRITE and is_zeroes(ios[i]):
            ios[i].flags |= d.flags
            for j in range(ios[i].iovcnt):
                ios[i].iov[j].iov_base = zeros
    d.lower.submit(d.lower.ctx, ios, n)


cdef uint32_t reap(void *ctx, engine_io **out, uint32_t room) noexcept nogil:
    cdef detecting *d = <detecting *>ctx
    return d.lower.reap(d.lower.ctx, out, room)


cdef void attach(void *ctx, void *io_uring) noexcept nogil:
    cdef detecting *d = <detecting *>ctx
    d.lower.attach(d.lower.ctx, io_uring)


cdef class ZeroesChannel:
    """`Channel` in front of another. unmap: whether zeros need no space."""

    cdef detecting d
    cdef engine_ports table
    cdef object lower

    def __init__(self, lower, *, bint unmap):
        self.lower = lower
        self.d.lower = engine_of(lower)
        self.d.flags = ENGINE_ZEROES | (ENGINE_UNMAP if unmap else 0)
        self.table.ctx = &self.d
        self.table.fd = self.d.lower.fd
        self.table.submit = submit
        self.table.reap = reap
        self.table.attach = attach

    @property
    def ports(self):
        """Capsule ``xvd.engine_ports``."""
        return wrap(&self.table, "xvd.engine_ports")

    def close(self):
        """Close the channel behind."""
        self.lower.close()


def all_zero(const uint8_t[::1] data not None):
    """Whether it holds nothing but zeros, and something. Each byte is looked at once."""
    return data.shape[0] > 0 and bool(xvd_is_zero(&data[0], data.shape[0]))
