# SPDX-License-Identifier: Apache-2.0
"""One frontend queue: what it holds (front.pyx)."""

from cpython.buffer cimport Py_buffer
from libc.stdint cimport int16_t, int32_t, uint8_t, uint16_t, uint32_t, uint64_t

from xvd.dataplane.abi cimport BLKIF_MAX_ENTRY_SIZE
from xvd.dataplane.ports cimport event_ports, granter_ports, stepper_ports
from xvd.dataplane.ring cimport front_ring

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass


# What a caller asked for: any length, split into ring requests as slots become free.
cdef struct front_io:
    uint8_t operation
    int32_t error                # 0 or -errno, the worst of the parts
    uint32_t outstanding         # parts on the ring
    uint64_t sector_number
    uint64_t nr_sectors
    uint64_t issued              # sectors put on the ring so far
    uint32_t started             # an operation without data has been put on the ring
    uint8_t *buffer
    uint64_t token
    front_io *next
    Py_buffer view
    uint32_t has_view
    uint32_t borrowed            # its memory is not the queue's to free

cdef struct io_list:
    front_io *first
    front_io *last

cdef enum shadow_state:
    SHADOW_FREE = 0
    SHADOW_IN_FLIGHT = 1

# Our private memory of a request: nothing is ever read back from the ring.
cdef struct shadow:
    uint8_t state
    uint8_t operation
    uint16_t nr_pages
    uint32_t size                # bytes of data
    uint64_t at                  # where in the caller's buffer
    front_io *io

cdef struct front_counters:
    uint64_t requests, responses, errors
    uint64_t rd_sect, wr_sect
    uint64_t granted, revoked
    uint64_t notified, suppressed, steps

cdef struct front_queue:
    front_ring ring
    granter_ports *pages
    event_ports *events
    uint16_t handle
    uint32_t segments_max
    uint32_t broken              # BREACH_*
    uint32_t stopping
    uint32_t in_flight
    shadow *shadows
    uint32_t *free_ids
    uint32_t nr_free
    io_list queued               # the stepping thread's
    pthread_mutex_t mutex        # guards the two below
    io_list incoming
    io_list done
    int done_fd
    uint8_t copy[BLKIF_MAX_ENTRY_SIZE]
    front_counters count

cdef void append(io_list *ios, front_io *io) noexcept nogil
cdef uint32_t front_step(void *ctx, uint32_t budget) noexcept nogil
cdef int front_may_sleep(void *ctx) noexcept nogil


cdef class FrontQueue:
    cdef front_queue q
    cdef stepper_ports table
    cdef object keep

    cdef lend(self, object memory)
    cdef drop(self, front_io *io)
    cdef drop_in_flight(self)
    cdef lock_buffer(self, front_io *io, object buffer)
