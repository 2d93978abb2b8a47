# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""Which parts of a disk were changed: a bit for each 64 KiB, and a channel that sets them.

A bit is set before the write it stands for is submitted. The map may be a file that is mapped: what
was set is there for a successor then, however this process ends.
"""

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from xvd.dataplane.abi cimport ENGINE_DISCARD, ENGINE_WRITE
from xvd.dataplane.c cimport xvd_load64, xvd_set_bits64
from xvd.dataplane.ports cimport engine_io, engine_of, engine_ports, wrap

cdef extern from *:
    int __builtin_popcountll(unsigned long long bits) nogil

GRANULE = 1 << GRANULE_SHIFT
"""Bytes of a disk that one bit stands for."""


def map_size(uint64_t size):
    """How many bytes the map of a disk of `size` bytes has."""
    return (end_granule(0, size) + 63) // 64 * 8


cdef uint64_t bits_of(const change_map *m, uint64_t word) noexcept nogil:
    """The bits of a word that stand for something."""
    cdef uint64_t last = m.granules & 63
    if last and word == m.granules >> 6:
        return ((<uint64_t>1) << last) - 1
    return <uint64_t>-1


cdef void mark_within(change_map *m, uint64_t offset, uint64_t length) noexcept nogil:
    """A range, as far as the map goes: a disk may have grown since it was made."""
    cdef uint64_t size = m.granules << GRANULE_SHIFT
    if offset < size:
        mark_range(m, offset, min(length, size - offset))


cdef class ChangeMap:
    """The map of a disk of `size` bytes, in memory that is given: writable, `map_size` long, and
    not to be let go before this is. Any thread; a bit that is set while others are read or taken
    over is seen then or the next time."""

    def __cinit__(self, memory, uint64_t size):
        PyObject_GetBuffer(memory, &self.view, PyBUF_WRITABLE)
        self.has_view = True
        if self.view.len != map_size(size):
            raise ValueError(f"a map of {size} bytes has {map_size(size)}, not {self.view.len}")
        self.m.words = <uint64_t *>self.view.buf
        self.m.granules = end_granule(0, size)

    def __dealloc__(self):
        self.close()

    def close(self):
        """Let the memory go; nobody may mark anything any more. Idempotent."""
        if self.has_view:
            PyBuffer_Release(&self.view)
        self.has_view, self.m.granules = False, 0

    def mark_all(self):
        """Everything was changed."""
        cdef uint64_t word
        for word in range((self.m.granules + 63) // 64):
            xvd_set_bits64(&self.m.words[word], bits_of(&self.m, word))

    def mark(self, uint64_t offset, uint64_t length):
        """A range was changed, in bytes; what lies behind the end is none of ours."""
        mark_within(&self.m, offset, length)

    def clear(self):
        """Nothing was changed; only while nobody marks."""
        if self.has_view:
            memset(self.view.buf, 0, self.view.len)

    def add(self, ChangeMap other not None):
        """Mark what is marked in a map of the same size."""
        cdef uint64_t word, bits
        if other.m.granules != self.m.granules:
            raise ValueError("the maps are of disks of different sizes")
        for word in range((self.m.granules + 63) // 64):
            bits = xvd_load64(&other.m.words[word])
            if bits:
                xvd_set_bits64(&self.m.words[word], bits & bits_of(&self.m, word))

    @property
    def marked(self):
        """How many granules are marked."""
        cdef uint64_t word, n = 0
        for word in range((self.m.granules + 63) // 64):
            n += __builtin_popcountll(xvd_load64(&self.m.words[word]) & bits_of(&self.m, word))
        return n

    def is_marked(self, uint64_t offset):
        """Whether the granule with this byte is."""
        if not is_within(&self.m, offset, 1):
            raise IndexError(f"{offset} is behind the end")
        return bool(is_marked(&self.m, offset >> GRANULE_SHIFT))


# ---- The channel -----------------------------------------------------------------------------

cdef struct tracked:
    engine_ports *lower
    change_map **maps
    uint32_t nr_maps


cdef void note(const tracked *t, const engine_io *io) noexcept nogil:
    cdef uint32_t i
    for i in range(t.nr_maps):
        mark_within(t.maps[i], io.offset, io.length)


cdef void submit(void *ctx, engine_io **ios, uint32_t n) noexcept nogil:
    cdef tracked *t = <tracked *>ctx
    cdef uint32_t i
    for i in range(n):
        if ios[i].op == ENGINE_WRITE or ios[i].op == ENGINE_DISCARD:
            note(t, ios[i])
    t.lower.submit(t.lower.ctx, ios, n)


cdef uint32_t reap(void *ctx, engine_io **out, uint32_t room) noexcept nogil:
    cdef tracked *t = <tracked *>ctx
    return t.lower.reap(t.lower.ctx, out, room)


cdef void attach(void *ctx, void *io_uring) noexcept nogil:
    cdef tracked *t = <tracked *>ctx
    t.lower.attach(t.lower.ctx, io_uring)


cdef class TrackedChannel:
    """`Channel` in front of another; it marks what it lets through in every one of `maps`."""

    cdef tracked t
    cdef engine_ports table
    cdef readonly object lower   # the channel behind
    cdef list maps

    def __init__(self, lower, maps):
        cdef ChangeMap one
        self.lower, self.maps = lower, list(maps)
        free(self.t.maps)
        self.t.nr_maps = 0
        self.t.maps = <change_map **>calloc(max(len(self.maps), 1), sizeof(void *))
        if self.t.maps == NULL:
            raise MemoryError("no memory for a channel")
        for one in self.maps:
            self.t.maps[self.t.nr_maps] = &one.m
            self.t.nr_maps += 1
        self.t.lower = engine_of(lower)
        self.table.ctx = &self.t
        self.table.fd = self.t.lower.fd
        self.table.submit = submit
        self.table.reap = reap
        self.table.attach = attach

    def __dealloc__(self):
        free(self.t.maps)

    @property
    def ports(self):
        """Capsule ``xvd.engine_ports``."""
        return wrap(&self.table, "xvd.engine_ports")

    def close(self):
        """Close the channel behind."""
        self.lower.close()
