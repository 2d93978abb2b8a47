# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""What every client of a disk respects, on whichever queue: the disk's limits, and the sectors that
are locked while somebody reads, changes and writes parts of blocks there.

A locked range keeps writes from beginning in it. Whoever locks it waits for those that had begun.
"""

from cython cimport no_gc_clear
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from posix.unistd cimport close, write

from xvd.dataplane.abi cimport BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_READ, BLKIF_OP_WRITE
from xvd.dataplane.front.queue cimport pthread_mutex_lock, pthread_mutex_unlock

import os

from xvd.errors import LocalProtocolError

cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attr)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)


cdef bint is_held(const range_lock *l, const front_io *io) noexcept nogil:
    cdef const held_range *h = l.held
    while h != NULL:
        if io.sector_number < h.end and h.first < io.sector_number + io.nr_sectors:
            return True
        h = h.next
    return False


cdef bint is_whole_blocks(const range_lock *l, const front_io *io) noexcept nogil:
    """Whether it is whole blocks of the disk."""
    return (io.nr_sectors > 0 and io.nr_sectors <= l.sectors
            and io.sector_number <= l.sectors - io.nr_sectors
            and io.sector_number % l.block_sectors == 0 and io.nr_sectors % l.block_sectors == 0)


cdef bint may_begin(const range_lock *l, const front_io *io) noexcept nogil:
    if io.operation == BLKIF_OP_FLUSH_DISKCACHE:
        return l.flushes
    if io.operation == BLKIF_OP_READ:
        return is_whole_blocks(l, io)
    if io.operation != BLKIF_OP_WRITE:
        return False
    # One that began before its sectors were held is waited for, wherever it goes on.
    return l.writable and is_whole_blocks(l, io) and (io.client.guarded or not is_held(l, io))


cdef void guard(range_lock *l, front_io *io) noexcept nogil:
    io.client.guarded = 1
    io.client.before = NULL
    io.client.after = l.writes
    if l.writes != NULL:
        l.writes.client.before = io
    l.writes = io


cdef void unguard(range_lock *l, front_io *io) noexcept nogil:
    cdef uint64_t one = 1
    if io.client.after != NULL:
        io.client.after.client.before = io.client.before
    if io.client.before != NULL:
        io.client.before.client.after = io.client.after
    else:
        l.writes = io.client.after
    io.client.guarded = 0
    if l.held != NULL:
        write(l.fd, &one, 8)


cdef bint enter_lock(range_lock *l, front_io *io) noexcept nogil:
    """Whether an operation may begin; a write is remembered until `leave_lock`."""
    cdef bint allowed
    pthread_mutex_lock(&l.mutex)
    allowed = may_begin(l, io)
    if allowed and io.operation == BLKIF_OP_WRITE and not io.client.guarded:
        guard(l, io)
    pthread_mutex_unlock(&l.mutex)
    return allowed


cdef void leave_lock(range_lock *l, front_io *io) noexcept nogil:
    if io.client.guarded:
        pthread_mutex_lock(&l.mutex)
        unguard(l, io)
        pthread_mutex_unlock(&l.mutex)


@no_gc_clear
cdef class RangeLock:
    """What every client of a disk respects. The methods by one thread; nothing is allowed yet."""

    def __init__(self):
        if self.l.block_sectors:
            raise LocalProtocolError("a range lock is made once")
        self.l.block_sectors = 1
        pthread_mutex_init(&self.l.mutex, NULL)
        self.l.fd = -1

    def __dealloc__(self):
        cdef held_range *h
        if self.l.block_sectors == 0:
            return
        while self.l.held != NULL:
            h = self.l.held
            self.l.held = h.next
            free(h)
        if self.l.fd >= 0:
            close(self.l.fd)
        pthread_mutex_destroy(&self.l.mutex)

    def allow(self, *, uint64_t sectors, uint32_t block_sectors, bint writable, bint flushes):
        """What the disk is from now on: its size and its block, in sectors of 512 bytes; whether it
        takes writes, and flushes."""
        if block_sectors == 0:
            raise LocalProtocolError("a block has at least one sector")
        pthread_mutex_lock(&self.l.mutex)
        self.l.sectors = sectors
        self.l.block_sectors = block_sectors
        self.l.writable = writable
        self.l.flushes = flushes
        pthread_mutex_unlock(&self.l.mutex)

    def hold(self, uint64_t first, uint64_t end):
        """Let no client's write begin on the sectors from `first` to before `end`; a token."""
        cdef held_range *h
        if self.l.fd < 0:
            self.l.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        h = <held_range *>calloc(1, sizeof(held_range))
        if h == NULL:
            raise MemoryError("no memory for a locked range")
        self.last += 1
        h.first, h.end, h.token = first, end, self.last
        pthread_mutex_lock(&self.l.mutex)
        h.next = self.l.held
        self.l.held = h
        pthread_mutex_unlock(&self.l.mutex)
        return self.last

    def busy(self, uint64_t token):
        """Whether a write that began before is still under way on the sectors held."""
        cdef const held_range *h
        cdef const front_io *io
        cdef bint found = False
        pthread_mutex_lock(&self.l.mutex)
        h = self.l.held
        while h != NULL and h.token != token:
            h = h.next
        io = self.l.writes if h != NULL else NULL
        while io != NULL and not found:
            found = io.sector_number < h.end and h.first < io.sector_number + io.nr_sectors
            io = io.client.after
        pthread_mutex_unlock(&self.l.mutex)
        return found

    def release(self, uint64_t token):
        """Let clients write there again. With the last one `fd` is closed."""
        cdef held_range *found = NULL
        cdef held_range **at = &self.l.held
        pthread_mutex_lock(&self.l.mutex)
        while at[0] != NULL:
            if at[0].token == token:
                found = at[0]
                at[0] = found.next
                break
            at = &at[0].next
        if self.l.held == NULL and self.l.fd >= 0:
            close(self.l.fd)
            self.l.fd = -1
        pthread_mutex_unlock(&self.l.mutex)
        free(found)

    @property
    def fd(self):
        """Readable (8 bytes) when a write has ended since something was held; -1 while nothing
        is."""
        return self.l.fd
