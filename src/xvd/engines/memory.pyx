# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""Storage in memory: sparse, zero at first, gone when closed. A discarded page reads as zeros."""

from cpython.buffer cimport PyBUF_WRITE
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.mman cimport (MADV_DONTNEED, MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ,
                         PROT_WRITE, madvise, mmap, munmap)

from xvd.dataplane.abi cimport ENGINE_DISCARD, ENGINE_READ, ENGINE_WRITE
from xvd.dataplane.ports cimport ENGINE_UNMAP, engine_io, engine_ports, wrap
from xvd.engines.channel cimport done_list, finish, reap_list

from xvd.errors import EngineError
from xvd.engines.interface import Engine, EngineInfo, Scheme, ThreadModel, no_files
from xvd.engines.text import parse_disk_size

import errno
import uuid

cdef extern from "sys/mman.h" nogil:
    int MAP_NORESERVE


cdef struct store:
    uint8_t *base
    done_list done


cdef void copy(const store *s, engine_io *io) noexcept nogil:
    cdef uint8_t *at = s.base + io.offset
    cdef uint32_t j
    for j in range(io.iovcnt):
        if io.op == ENGINE_READ:
            memcpy(io.iov[j].iov_base, at, io.iov[j].iov_len)
        else:
            memcpy(at, io.iov[j].iov_base, io.iov[j].iov_len)
        at += io.iov[j].iov_len


cdef void forget(uint8_t *base, uint64_t offset, uint64_t length) noexcept nogil:
    """Whole pages go back to the system; the edges are cleared."""
    cdef uint64_t end = offset + length
    cdef uint64_t first = (offset + 4095) & ~<uint64_t>4095
    cdef uint64_t last = end & ~<uint64_t>4095
    if first >= last:
        memset(base + offset, 0, length)
        return
    memset(base + offset, 0, first - offset)
    memset(base + last, 0, end - last)
    madvise(base + first, last - first, MADV_DONTNEED)


cdef void submit(void *ctx, engine_io **ios, uint32_t n) noexcept nogil:
    cdef store *s = <store *>ctx
    cdef uint32_t i
    for i in range(n):
        if ios[i].op == ENGINE_DISCARD or ios[i].op == ENGINE_WRITE and ios[i].flags & ENGINE_UNMAP:
            forget(s.base, ios[i].offset, ios[i].length)
        elif ios[i].op == ENGINE_READ or ios[i].op == ENGINE_WRITE:
            copy(s, ios[i])
        finish(&s.done, ios[i], 0)


cdef uint32_t reap(void *ctx, engine_io **out, uint32_t room) noexcept nogil:
    return reap_list(&(<store *>ctx).done, out, room)


cdef void attach(void *ctx, void *io_uring) noexcept nogil:
    pass


cdef class MemoryChannel:
    """`Channel` of `MemoryEngine`."""

    cdef store s
    cdef engine_ports table
    cdef Region region

    def __init__(self, Region region):
        self.region = region
        self.s.base = region.base
        self.table.ctx = &self.s
        self.table.fd = -1
        self.table.submit = submit
        self.table.reap = reap
        self.table.attach = attach

    @property
    def ports(self):
        """Capsule ``xvd.engine_ports``."""
        return wrap(&self.table, "xvd.engine_ports")

    def close(self):
        """The region lives on with its engine."""


cdef class Region:
    """Anonymous memory, kept while anybody refers to it."""

    cdef uint8_t *base
    cdef readonly size_t size

    def __cinit__(self, size_t size):
        cdef void *at = mmap(NULL, size, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if at == MAP_FAILED:
            raise EngineError(errno.ENOMEM, f"no address space for a disk of {size} bytes in "
                              "memory; choose a smaller one, or a file")
        self.base = <uint8_t *>at
        self.size = size

    def __dealloc__(self):
        if self.base != NULL:
            munmap(self.base, self.size)

    def view(self):
        """All of it as writable bytes."""
        return PyMemoryView_FromMemory(<char *>self.base, self.size, PyBUF_WRITE)

    def forget(self, uint64_t offset, uint64_t length):
        """Back to zeros; the caller has checked the range."""
        forget(self.base, offset, length)


class MemoryEngine(Engine):
    """``memory:SIZE``."""

    def __init__(self, size):
        # Pages go back to the system, which clears them before anybody gets them.
        self._info = EngineInfo(size=size, can_discard=True, can_secure_discard=True,
                                discard_granularity=4096, thread_model=ThreadModel.PARALLEL)
        self._region = Region(size)
        self.view = self._region.view()
        self._identity = f"memory {uuid.uuid4()}"

    @property
    def info(self):
        """Its size, block sizes and abilities."""
        return self._info

    @property
    def identity(self):
        """Another for each engine: what is in memory ends with it."""
        return self._identity

    def read(self, buffer, offset):
        """Copy out."""
        buffer[:] = self.view[offset:offset + len(buffer)]

    def write(self, buffer, offset):
        """Copy in."""
        self.view[offset:offset + len(buffer)] = buffer

    def discard(self, offset, length):
        """Back to zeros."""
        self._region.forget(offset, length)

    def secure_discard(self, offset, length):
        """Back to zeros."""
        self._region.forget(offset, length)

    def open_channel(self):
        """A compiled channel."""
        return MemoryChannel(self._region)


SCHEMES = (
    Scheme("memory", "memory:SIZE", "memory, gone at the end",
           lambda rest, how: MemoryEngine(parse_disk_size(rest)), no_files),
)
