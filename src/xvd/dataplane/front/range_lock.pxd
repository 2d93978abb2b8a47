# SPDX-License-Identifier: Apache-2.0
"""Sectors that no client may begin to write (range_lock.pyx)."""

from libc.stdint cimport uint32_t, uint64_t

from xvd.dataplane.front.queue cimport pthread_mutex_t
from xvd.dataplane.ports cimport front_io


cdef struct held_range:
    uint64_t first, end          # sectors
    uint64_t token
    held_range *next

cdef struct range_lock:
    pthread_mutex_t mutex        # guards all of it
    uint64_t sectors             # of the disk
    uint32_t block_sectors
    uint32_t writable
    uint32_t flushes             # the backend takes a flush
    held_range *held
    front_io *writes             # of all clients, under way
    int fd                       # while something is held: rung when one of them ends


cdef bint enter_lock(range_lock *l, front_io *io) noexcept nogil
cdef void leave_lock(range_lock *l, front_io *io) noexcept nogil


cdef class RangeLock:
    cdef range_lock l
    cdef uint64_t last
