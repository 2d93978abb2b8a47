# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""Copy on write: what a guest writes goes to one storage, and what it has not written is read from
another, which stays as it is.

A bit for each block says where it is. It is set when the write is over and before that is answered,
so a write needs nothing of what was there before. A read that touches blocks of both is done in
runs, one after the other.
"""

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EAGAIN
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from posix.uio cimport iovec
from posix.unistd cimport close

from xvd.dataplane.abi cimport ENGINE_DISCARD, ENGINE_READ, ENGINE_WRITE
from xvd.dataplane.c cimport xvd_load64, xvd_set_bits64
from xvd.dataplane.ports cimport engine_io, engine_of, engine_ports, wrap
from xvd.engines.channel cimport done_list, either_fd, finish, reap_list

cdef enum:
    PLACES = 2048                # requests of the largest ring: a queue has no more in flight
    PARTS = 64                   # of a run; a longer one is two


cdef struct block_map:
    uint64_t *words              # a bit for each block that was written
    uint32_t shift

# A write or discard whose blocks are to be noted, or a read that is done in runs.
cdef struct piece:
    engine_io run                # of a read, the one that is under way
    engine_io *io
    void *owner                  # whose that is; ours is this piece while it is below
    uint64_t offset, length      # of a write; of a read, what is not begun yet
    uint64_t done                # of a read: bytes
    iovec *parts                 # of the run; PARTS of them
    piece *next

cdef struct cow:
    engine_ports *base
    engine_ports *over
    block_map *map
    piece *pieces
    iovec *parts
    piece *free
    done_list done


def map_size(uint64_t size, uint32_t block):
    """How many bytes the map of a disk has."""
    return (size // block + 63) // 64 * 8


cdef bint is_written(const block_map *m, uint64_t block) noexcept nogil:
    return xvd_load64(&m.words[block >> 6]) >> (block & 63) & 1


cdef void note(block_map *m, uint64_t offset, uint64_t length) noexcept nogil:
    cdef uint64_t block = offset >> m.shift, end = (offset + length) >> m.shift
    cdef uint64_t count, bits
    while block < end:
        count = min(64 - (block & 63), end - block)
        bits = <uint64_t>-1 if count == 64 else ((<uint64_t>1 << count) - 1) << (block & 63)
        xvd_set_bits64(&m.words[block >> 6], bits)
        block += count


cdef uint64_t run_at(const block_map *m, uint64_t offset, uint64_t length) noexcept nogil:
    """For how many bytes a range is where it begins."""
    cdef uint64_t block = offset >> m.shift, end = (offset + length) >> m.shift
    cdef bint where = is_written(m, block)
    block += 1
    while block < end and is_written(m, block) == where:
        block += 1
    return min((block << m.shift) - offset, length)


cdef uint64_t slice_parts(const engine_io *io, uint64_t skipped, uint64_t length, iovec *parts,
                          uint16_t *count) noexcept nogil:
    """The memory of a range of an operation, as far as there are parts for it; how many bytes."""
    cdef uint64_t taken = 0, size, at = 0
    cdef uint32_t i
    count[0] = 0
    for i in range(io.iovcnt):
        size = io.iov[i].iov_len
        if at + size > skipped:
            if count[0] == PARTS or taken == length:
                break
            size -= skipped - at
            size = min(size, length - taken)
            parts[count[0]].iov_base = <char *>io.iov[i].iov_base + (skipped - at)
            parts[count[0]].iov_len = size
            count[0] += 1
            taken += size
            skipped += size
        at += io.iov[i].iov_len
    return taken


cdef void next_run(cow *c, piece *p) noexcept nogil:
    cdef uint64_t length = run_at(c.map, p.offset, p.length)
    cdef engine_ports *where = c.over if is_written(c.map, p.offset >> c.map.shift) else c.base
    cdef engine_io *run = &p.run
    memset(run, 0, sizeof(engine_io))
    length = slice_parts(p.io, p.done, length, p.parts, &run.iovcnt)
    run.op, run.offset, run.length = ENGINE_READ, p.offset, length
    run.iov, run.owner = p.parts, p
    p.offset += length
    p.length -= length
    p.done += length
    where.submit(where.ctx, &run, 1)


cdef piece *take(cow *c, engine_io *io) noexcept nogil:
    cdef piece *p = c.free
    if p == NULL:
        finish(&c.done, io, -EAGAIN)
        return NULL
    c.free = p.next
    p.io, p.owner, p.offset, p.length, p.done = io, io.owner, io.offset, io.length, 0
    return p


cdef void give_back(cow *c, piece *p) noexcept nogil:
    p.io.owner = p.owner
    p.next = c.free
    c.free = p


cdef void submit(void *ctx, engine_io **ios, uint32_t n) noexcept nogil:
    cdef cow *c = <cow *>ctx
    cdef uint32_t i
    cdef engine_io *io
    cdef engine_ports *where
    cdef piece *p
    for i in range(n):
        io = ios[i]
        where = c.over
        if io.op == ENGINE_READ and io.length:
            if run_at(c.map, io.offset, io.length) < io.length:
                p = take(c, io)
                if p != NULL:
                    next_run(c, p)
                continue
            if not is_written(c.map, io.offset >> c.map.shift):
                where = c.base
        elif io.op == ENGINE_WRITE or io.op == ENGINE_DISCARD:
            p = take(c, io)
            if p == NULL:
                continue
            io.owner = p
        where.submit(where.ctx, &io, 1)


cdef piece *piece_of(const cow *c, const engine_io *io) noexcept nogil:
    """Our own part of an operation that comes back; NULL for one that was passed on."""
    cdef piece *found = <piece *>io.owner
    return found if c.pieces <= found and found < c.pieces + PLACES else NULL


cdef bint is_over(cow *c, engine_io *io) noexcept nogil:
    """Take what came back; False if it was a run: then more is under way, or on the list."""
    cdef piece *p = piece_of(c, io)
    if p == NULL:
        return True
    if io == p.io:
        if io.result >= 0:
            note(c.map, p.offset, p.length)
        give_back(c, p)
        return True
    if io.result >= 0 and p.length:
        next_run(c, p)
    else:
        give_back(c, p)
        finish(&c.done, p.io, min(io.result, 0))
    return False


cdef uint32_t reap_one(cow *c, engine_ports *where, engine_io **out, uint32_t room,
                       bint *again) noexcept nogil:
    cdef uint32_t i, n = 0, found = where.reap(where.ctx, out, room)
    for i in range(found):
        if is_over(c, out[i]):
            out[n] = out[i]
            n += 1
        else:
            again[0] = True
    return n


cdef uint32_t reap(void *ctx, engine_io **out, uint32_t room) noexcept nogil:
    cdef cow *c = <cow *>ctx
    cdef uint32_t n = 0
    cdef bint again = True
    while again and n < room:
        again = False
        n += reap_list(&c.done, out + n, room - n)
        n += reap_one(c, c.over, out + n, room - n, &again)
        n += reap_one(c, c.base, out + n, room - n, &again)
    return n


cdef void attach(void *ctx, void *io_uring) noexcept nogil:
    cdef cow *c = <cow *>ctx
    c.over.attach(c.over.ctx, io_uring)
    c.base.attach(c.base.ctx, io_uring)


cdef class BlockMap:
    """Which blocks of a disk of `size` bytes were written, in memory of `map_size` bytes."""

    cdef block_map m
    cdef Py_buffer view
    cdef bint has_view
    cdef readonly uint32_t block

    def __cinit__(self, memory, uint64_t size, uint32_t block):
        PyObject_GetBuffer(memory, &self.view, PyBUF_WRITABLE)
        self.has_view = True
        if self.view.len != map_size(size, block):
            raise ValueError(f"a map has {map_size(size, block)} bytes, not {self.view.len}")
        self.block = block
        self.m.words = <uint64_t *>self.view.buf
        self.m.shift = block.bit_length() - 1

    def __dealloc__(self):
        self.close()

    def close(self):
        """Let the memory go; nobody may read or write any more. Idempotent."""
        if self.has_view:
            PyBuffer_Release(&self.view)
        self.has_view = False

    def note(self, uint64_t offset, uint64_t length):
        """A range was written: bytes, whole blocks."""
        note(&self.m, offset, length)

    def run_at(self, uint64_t offset, uint64_t length):
        """Whether a range was written where it begins, and for how many bytes that is so."""
        return (bool(is_written(&self.m, offset >> self.m.shift)),
                run_at(&self.m, offset, length))


cdef class CowChannel:
    """`Channel` in front of one to the base, which is only read, and one to what is written."""

    cdef cow c
    cdef engine_ports table
    cdef object base, over
    cdef BlockMap blocks
    cdef int epoll_fd

    def __cinit__(self):
        self.epoll_fd = -1

    def __init__(self, base, over, BlockMap blocks not None):
        cdef uint32_t i
        if self.c.pieces != NULL:
            raise ValueError("a channel is made once")
        self.base, self.over, self.blocks = base, over, blocks
        self.c.base, self.c.over, self.c.map = engine_of(base), engine_of(over), &blocks.m
        self.c.pieces = <piece *>calloc(PLACES, sizeof(piece))
        self.c.parts = <iovec *>calloc(<size_t>PLACES * PARTS, sizeof(iovec))
        if self.c.pieces == NULL or self.c.parts == NULL:
            raise MemoryError("no memory for a channel")
        for i in range(PLACES):
            self.c.pieces[i].parts = self.c.parts + <size_t>i * PARTS
            self.c.pieces[i].next = self.c.free
            self.c.free = &self.c.pieces[i]
        self.table.fd = either_fd(self.c.base.fd, self.c.over.fd, &self.epoll_fd)
        self.table.ctx = &self.c
        self.table.submit = submit
        self.table.reap = reap
        self.table.attach = attach

    def __dealloc__(self):
        free(self.c.pieces)
        free(self.c.parts)
        if self.epoll_fd >= 0:
            close(self.epoll_fd)

    @property
    def ports(self):
        """Capsule ``xvd.engine_ports``."""
        return wrap(&self.table, "xvd.engine_ports")

    def close(self):
        """Close both; nothing may be in flight."""
        self.base.close()
        self.over.close()
