# SPDX-License-Identifier: Apache-2.0
# Inline header of dataplane/front/.
"""One frontend queue: what it holds (queue.pyx)."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from xvd.dataplane.abi cimport (
    BLKIF_MAX_ENTRY_SIZE, BLKIF_OP_READ, BLKIF_OP_WRITE, BLKIF_OP_WRITE_BARRIER)
from xvd.dataplane.front.pool cimport page_pool
from xvd.dataplane.latency cimport kind_counts, latencies
from xvd.dataplane.ports cimport event_ports, front_io, stepper_ports
from xvd.dataplane.ring.ring cimport front_ring

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)


cdef struct io_list:
    front_io *first
    front_io *last

cdef enum shadow_state:
    SHADOW_FREE = 0
    SHADOW_IN_FLIGHT = 1

# Our private memory of a request: nothing is ever read back from the ring.
cdef struct shadow:
    uint8_t state
    uint8_t operation            # of an indirect request the inner one
    uint8_t nr_indirect          # pages of descriptors; 0 for a direct request
    uint8_t in_place             # its pages of data are its operation's
    uint16_t nr_pages            # pages of data
    uint32_t first_page          # of the data's chain in the pool
    uint32_t first_indirect      # of the descriptors'
    uint32_t size                # bytes of data
    uint64_t at                  # where in the first operation's buffer
    uint64_t begun_ns            # when it was put on the ring
    front_io *io                 # the first operation with data in it

cdef struct front_counters:
    uint64_t requests, responses, errors
    uint64_t indirect, merged, split
    uint64_t waits               # units that found no slot or no page
    uint64_t notified, suppressed, steps

cdef struct front_queue:
    front_ring ring
    page_pool pool
    event_ports *events
    uint16_t handle
    uint32_t sectors_max         # in one request, whole blocks; above 88 by indirect descriptors
    uint32_t wire_sector         # what the backend counts in: 512-byte sectors to one of its own
    uint32_t unit_sectors        # in what goes on the ring at once, whole guest pages
    uint32_t unit_pages          # that it needs at most
    uint32_t wipe                # what is not data in a page is zero when the backend sees it
    uint32_t broken              # BREACH_*
    uint32_t stopping
    uint32_t scan                # idle grants are to be ended
    uint32_t in_flight
    shadow *shadows
    uint32_t *free_ids
    uint32_t nr_free
    io_list queued               # the stepping thread's
    io_list returned             # its own too: borrowed operations that are over
    pthread_mutex_t mutex        # guards the two below
    io_list incoming
    io_list done
    int done_fd
    uint8_t copy[BLKIF_MAX_ENTRY_SIZE]
    uint64_t now_ns              # as of the beginning of this step
    front_counters count
    kind_counts kinds
    latencies latency


cdef inline void append(io_list *ios, front_io *io) noexcept nogil:
    io.next = NULL
    if ios.last == NULL:
        ios.first = io
    else:
        ios.last.next = io
    ios.last = io


cdef inline bint is_rw(const front_io *io) noexcept nogil:
    """Whether it may be split, and joined to a neighbour."""
    return io.operation == BLKIF_OP_READ or io.operation == BLKIF_OP_WRITE


cdef inline bint has_data(const front_io *io) noexcept nogil:
    return is_rw(io) or (io.operation == BLKIF_OP_WRITE_BARRIER and io.nr_sectors > 0)


cdef inline bint is_issued(const front_io *io) noexcept nogil:
    """Whether no further part of it has to go on the ring."""
    return io.queue.issued == io.nr_sectors if has_data(io) else io.queue.started


cdef void forget_operations(front_queue *q) noexcept nogil
cdef uint32_t front_step(void *ctx, uint32_t budget) noexcept nogil
cdef int front_may_sleep(void *ctx) noexcept nogil
cdef int front_peek(void *ctx) noexcept nogil


cdef class FrontQueue:
    cdef front_queue q
    cdef stepper_ports table
    cdef object keep

    cdef set_limits(self, uint32_t pages, uint32_t segments_max, uint32_t block_sectors,
                    uint32_t page_grants)
    cdef lend(self, object memory)
    cdef check(self, int operation, uint64_t nr_sectors)
    cdef lock_buffer(self, front_io *io, object buffer)
