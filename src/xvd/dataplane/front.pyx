# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""The frontend's queue: a state machine with one step.

A caller's operation of any length waits in `incoming`; `issue` splits it into ring requests as
slots become free, copies written data into granted pages, and remembers each request in a private
shadow; `take_responses` checks every response against the shadow, copies read data out, takes the
grants back, and hands the operation over when its last part is done.

Slot i of the shadow owns pages 11*i to 11*i+10 of the pool, so there is nothing to look for. The
backend is not believed: it may send what it likes, and breaks only its own device.
"""

from cython cimport no_gc_clear
from cpython.buffer cimport (PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer)
from libc.errno cimport EIO, EOPNOTSUPP
from libc.stdint cimport int16_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.unistd cimport close, write

from xvd.dataplane.abi cimport (
    BLKIF_MAX_SEGMENTS_PER_REQUEST, BLKIF_OP_DISCARD, BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_READ, BLKIF_OP_WRITE, BLKIF_PAGE_SIZE, BLKIF_RSP_EOPNOTSUPP, BLKIF_RSP_OKAY,
    BLKIF_SECTOR_SIZE, BREACH_GRANT_STILL_MAPPED, BREACH_NONE, BREACH_NOT_IN_FLIGHT,
    BREACH_RESPONSE_OVERFLOW, BREACH_UNKNOWN_ID, BREACH_WRONG_OPERATION, blkif_breach_names,
    blkif_layout, blkif_layouts)
from xvd.dataplane.c cimport DEBUG_ASSERT, xvd_get16, xvd_get64, xvd_put16, xvd_put32, xvd_put64
from xvd.dataplane.ports cimport (STEP_BROKEN, STEP_DRAINED, STEP_WORKED, events_of, granter_of,
                                  wrap)
from xvd.dataplane.ring cimport (
    RING_BROKEN, check_ring, front_copy, front_final_check, front_free, front_init, front_next_slot,
    front_pending, front_push)

import os

from xvd.errors import LocalProtocolError

cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attr)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)


cdef void append(io_list *ios, front_io *io) noexcept nogil:
    io.next = NULL
    if ios.last == NULL:
        ios.first = io
    else:
        ios.last.next = io
    ios.last = io


cdef front_io *take_all(front_queue *q, io_list *ios) noexcept nogil:
    """Empty one of the lists that the mutex guards; its first."""
    cdef front_io *first
    pthread_mutex_lock(&q.mutex)
    first = ios.first
    ios.first = ios.last = NULL
    pthread_mutex_unlock(&q.mutex)
    return first


cdef void hand_over(front_queue *q, front_io *io) noexcept nogil:
    """The operation is over; the first of several rings the bell for all."""
    cdef uint64_t one = 1
    cdef bint first
    pthread_mutex_lock(&q.mutex)
    first = q.done.first == NULL
    append(&q.done, io)
    pthread_mutex_unlock(&q.mutex)
    if first:
        write(q.done_fd, &one, 8)


# ---- Responses -------------------------------------------------------------------------------

cdef int32_t worse(int32_t a, int32_t b) noexcept nogil:
    """Of two outcomes the graver: an error before "not supported" before success."""
    if a == 0 or (a == -EOPNOTSUPP and b != 0):
        return b
    return a


cdef bint end_grants(front_queue *q, uint32_t id, shadow *s) noexcept nogil:
    """Take back what the request had granted; False if the backend holds on to a page (XSA-396)."""
    cdef uint32_t i
    for i in range(s.nr_pages):
        if q.pages.revoke(q.pages.ctx, id * BLKIF_MAX_SEGMENTS_PER_REQUEST + i) != 0:
            return False
    q.count.revoked += s.nr_pages
    return True


cdef uint8_t *data_of(front_queue *q, uint32_t id) noexcept nogil:
    return q.pages.base + <size_t>id * BLKIF_MAX_SEGMENTS_PER_REQUEST * BLKIF_PAGE_SIZE


cdef int finish(front_queue *q, uint32_t id, int16_t status) noexcept nogil:
    """A checked response: its part of the operation is over."""
    cdef shadow *s = &q.shadows[id]
    cdef front_io *io = s.io
    if not end_grants(q, id, s):
        return BREACH_GRANT_STILL_MAPPED
    if status == BLKIF_RSP_OKAY:
        if s.operation == BLKIF_OP_READ:
            memcpy(io.buffer + s.at, data_of(q, id), s.size)
    else:
        q.count.errors += 1
        # NetBSD answers with raw errno values: whatever is neither of the known two is an error.
        io.error = worse(io.error, -EOPNOTSUPP if status == BLKIF_RSP_EOPNOTSUPP else -EIO)
    s.state = SHADOW_FREE
    s.io = NULL
    q.free_ids[q.nr_free] = id
    q.nr_free += 1
    q.in_flight -= 1
    io.outstanding -= 1
    if io.outstanding == 0 and is_issued(io):
        hand_over(q, io)
    return BREACH_NONE


cdef int check(front_queue *q, uint64_t id, uint8_t operation) noexcept nogil:
    if id >= q.ring.nr_ents:
        return BREACH_UNKNOWN_ID
    if q.shadows[id].state != SHADOW_IN_FLIGHT:
        return BREACH_NOT_IN_FLIGHT
    if q.shadows[id].operation != operation:
        return BREACH_WRONG_OPERATION
    return BREACH_NONE


cdef uint32_t take_responses(front_queue *q) noexcept nogil:
    """All that are there by one look; the first lie breaks the device."""
    cdef const blkif_layout *at = q.ring.layout
    cdef uint32_t count, i
    cdef uint64_t id
    cdef int breach
    if front_pending(&q.ring, &count) == RING_BROKEN:
        q.broken = BREACH_RESPONSE_OVERFLOW
        return 0
    for i in range(count):
        front_copy(&q.ring, q.copy)
        id = xvd_get64(q.copy + at.response_id)
        breach = check(q, id, q.copy[at.response_operation])
        if breach == BREACH_NONE:
            breach = finish(q, <uint32_t>id, <int16_t>xvd_get16(q.copy + at.response_status))
        if breach != BREACH_NONE:
            q.broken = breach
            return i
    q.count.responses += count
    return count


# ---- Requests --------------------------------------------------------------------------------

cdef bint has_data(const front_io *io) noexcept nogil:
    return io.operation == BLKIF_OP_READ or io.operation == BLKIF_OP_WRITE


cdef bint is_issued(const front_io *io) noexcept nogil:
    """Whether no further part of it has to go on the ring."""
    return io.issued == io.nr_sectors if has_data(io) else io.started


cdef void put_data(front_queue *q, uint8_t *slot, uint32_t id, front_io *io) noexcept nogil:
    """The segments of one part: packed from the first page of the slot's own pages on."""
    cdef const blkif_layout *at = q.ring.layout
    cdef shadow *s = &q.shadows[id]
    cdef uint64_t left = io.nr_sectors - io.issued
    cdef uint64_t sectors = min(left, <uint64_t>q.segments_max * 8)
    cdef uint32_t page, i, first_page = id * BLKIF_MAX_SEGMENTS_PER_REQUEST
    cdef uint8_t *segment = slot + at.rw_seg
    s.at = io.issued * BLKIF_SECTOR_SIZE
    s.size = <uint32_t>sectors * BLKIF_SECTOR_SIZE
    s.nr_pages = <uint16_t>((sectors + 7) // 8)
    if io.operation == BLKIF_OP_WRITE:
        memcpy(data_of(q, id), io.buffer + s.at, s.size)
        q.count.wr_sect += sectors
    else:
        q.count.rd_sect += sectors
    slot[at.rw_nr_segments] = <uint8_t>s.nr_pages
    xvd_put64(slot + at.rw_sector_number, io.sector_number + io.issued)
    for i in range(s.nr_pages):
        page = first_page + i
        q.pages.grant(q.pages.ctx, page, io.operation == BLKIF_OP_WRITE)
        xvd_put32(segment + at.segment_gref, q.pages.grefs[page])
        segment[at.segment_first_sect] = 0
        segment[at.segment_last_sect] = 7 if i + 1 < s.nr_pages else <uint8_t>((sectors - 1) % 8)
        segment += at.segment_size
    q.count.granted += s.nr_pages
    io.issued += sectors


cdef void put(front_queue *q, front_io *io) noexcept nogil:
    """Put one part of an operation on the ring; there is a slot and a shadow for it."""
    cdef const blkif_layout *at = q.ring.layout
    cdef uint8_t *slot = front_next_slot(&q.ring)
    cdef uint32_t id
    q.nr_free -= 1
    id = q.free_ids[q.nr_free]
    DEBUG_ASSERT(q.shadows[id].state == SHADOW_FREE)
    memset(&q.shadows[id], 0, sizeof(shadow))
    q.shadows[id].state = SHADOW_IN_FLIGHT
    q.shadows[id].operation = io.operation
    q.shadows[id].io = io
    memset(slot, 0, at.entry_size)
    slot[at.rw_operation] = io.operation
    if io.operation == BLKIF_OP_DISCARD:
        xvd_put16(slot + at.discard_handle, q.handle)
        xvd_put64(slot + at.discard_id, id)
        xvd_put64(slot + at.discard_sector_number, io.sector_number)
        xvd_put64(slot + at.discard_nr_sectors, io.nr_sectors)
    else:
        xvd_put16(slot + at.rw_handle, q.handle)
        xvd_put64(slot + at.rw_id, id)
        if has_data(io):
            put_data(q, slot, id, io)
    io.started = 1
    io.outstanding += 1
    q.in_flight += 1
    q.count.requests += 1


cdef uint32_t issue(front_queue *q, uint32_t budget) noexcept nogil:
    """Move queued operations onto the ring, in order, as far as there is room."""
    cdef uint32_t n = 0
    cdef front_io *io
    while q.queued.first != NULL and n < budget and q.nr_free and front_free(&q.ring):
        io = q.queued.first
        put(q, io)
        n += 1
        if is_issued(io):
            q.queued.first = io.next
            if io.next == NULL:
                q.queued.last = NULL
    return n


cdef void accept(front_queue *q) noexcept nogil:
    cdef front_io *io = take_all(q, &q.incoming)
    cdef front_io *following
    while io != NULL:
        following = io.next
        append(&q.queued, io)
        io = following


cdef uint32_t front_step(void *ctx, uint32_t budget) noexcept nogil:
    """One bounded round; STEP_* flags."""
    cdef front_queue *q = <front_queue *>ctx
    cdef uint32_t taken, issued = 0
    q.count.steps += 1
    if q.broken:
        return STEP_BROKEN | STEP_DRAINED
    taken = take_responses(q)
    if q.broken:
        return STEP_BROKEN | STEP_DRAINED
    if not q.stopping:
        accept(q)
        issued = issue(q, budget)
    elif q.in_flight == 0:
        return STEP_DRAINED
    if issued:
        if front_push(&q.ring):
            q.count.notified += 1
            q.events.notify(q.events.ctx)
        else:
            q.count.suppressed += 1
    return STEP_WORKED if taken or issued else 0


cdef int front_may_sleep(void *ctx) noexcept nogil:
    cdef front_queue *q = <front_queue *>ctx
    return not front_final_check(&q.ring)


@no_gc_clear  # what was lent must outlive the lists that lead into it
cdef class FrontQueue:
    """One queue of one disk. `step` by one thread; `submit` and `reap` by any other.

    ring: writable buffer over our own zeroed ring pages, which are initialised here. pages: the
    object with the granter's capsule, ``nr_ents * 11`` pages. handle: low 16 bits of the vdev.
    """

    def __init__(self, ring, uint32_t nr_ents, int abi, pages, events, *, uint16_t handle=0,
                 uint32_t segments_max=BLKIF_MAX_SEGMENTS_PER_REQUEST):
        cdef uint8_t[::1] page = ring
        cdef uint32_t i
        if self.q.shadows != NULL:
            raise LocalProtocolError("a queue is made once")
        check_ring(page.shape[0], nr_ents, abi)
        if not 1 <= segments_max <= BLKIF_MAX_SEGMENTS_PER_REQUEST:
            raise LocalProtocolError(f"a request has 1 to 11 segments, not {segments_max}")
        self.keep = (ring, pages, events)
        self.q.pages = granter_of(pages)
        if self.q.pages.count < nr_ents * BLKIF_MAX_SEGMENTS_PER_REQUEST:
            raise LocalProtocolError(f"{nr_ents} requests need {nr_ents * 11} pages")
        self.q.events = events_of(events)
        self.q.handle = handle
        self.q.segments_max = segments_max
        self.q.ring.sring = &page[0]
        self.q.ring.nr_ents = nr_ents
        self.q.ring.layout = &blkif_layouts[abi]
        self.q.done_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        pthread_mutex_init(&self.q.mutex, NULL)
        self.q.shadows = <shadow *>calloc(nr_ents, sizeof(shadow))
        self.q.free_ids = <uint32_t *>calloc(nr_ents, sizeof(uint32_t))
        if not self.q.shadows or not self.q.free_ids:
            raise MemoryError(f"no memory for a queue of {nr_ents} requests")
        for i in range(nr_ents):
            self.q.free_ids[i] = nr_ents - 1 - i
        self.q.nr_free = nr_ents
        for i in range(nr_ents * BLKIF_MAX_SEGMENTS_PER_REQUEST):
            self.q.pages.revoke(self.q.pages.ctx, i)
        front_init(&self.q.ring)
        self.table.ctx = &self.q
        self.table.step = front_step
        self.table.may_sleep = front_may_sleep
        self.table.events = self.q.events
        self.table.engine = NULL

    def __dealloc__(self):
        if self.q.shadows == NULL:
            return
        self.drop_in_flight()
        self.drop(take_all(&self.q, &self.q.incoming))
        self.drop(take_all(&self.q, &self.q.done))
        self.drop(self.q.queued.first)
        close(self.q.done_fd)
        pthread_mutex_destroy(&self.q.mutex)
        free(self.q.shadows)
        free(self.q.free_ids)

    cdef drop(self, front_io *io):
        cdef front_io *following
        while io != NULL:
            following = io.next
            if io.has_view:
                PyBuffer_Release(&io.view)
            if not io.borrowed:
                free(io)
            io = following

    cdef drop_in_flight(self):
        """Operations of which only shadows know: all of them is on the ring, and not answered."""
        cdef uint32_t id
        cdef front_io *io
        for id in range(self.q.ring.nr_ents):
            io = self.q.shadows[id].io
            if io == NULL:
                continue
            io.outstanding -= 1
            if io.outstanding == 0 and is_issued(io):
                io.next = NULL
                self.drop(io)

    cdef lend(self, object memory):
        """Keep the memory that borrowed operations lie in for as long as the queue may see them."""
        self.keep += (memory,)

    @property
    def ports(self):
        """Capsule ``xvd.stepper_ports``, for a `Loop`."""
        return wrap(&self.table, "xvd.stepper_ports")

    def submit(self, int operation, uint64_t sector_number, uint64_t nr_sectors, buffer,
               uint64_t token):
        """Queue an operation; True if the stepping thread must be woken for it.

        operation: READ 0, WRITE 1, FLUSH_DISKCACHE 3 or DISCARD 5. buffer: for reads a writable,
        for writes any buffer of exactly ``nr_sectors * 512`` bytes, locked until reaped. token: is
        given back by `reap`.
        """
        cdef front_io *io
        cdef bint first
        if operation not in (0, 1, 3, 5):
            raise LocalProtocolError(f"operation {operation} is none of read, write, flush, discard")
        if operation <= 1 and nr_sectors == 0:
            raise LocalProtocolError("a read or write has at least one sector")
        io = <front_io *>calloc(1, sizeof(front_io))
        if io == NULL:
            raise MemoryError("no memory for an operation")
        io.operation = operation
        io.sector_number = sector_number
        io.nr_sectors = nr_sectors
        io.token = token
        if operation <= 1:
            self.lock_buffer(io, buffer)
        pthread_mutex_lock(&self.q.mutex)
        first = self.q.incoming.first == NULL
        append(&self.q.incoming, io)
        pthread_mutex_unlock(&self.q.mutex)
        return first

    cdef lock_buffer(self, front_io *io, object buffer):
        cdef int flags = PyBUF_SIMPLE if io.operation == BLKIF_OP_WRITE else PyBUF_WRITABLE
        try:
            PyObject_GetBuffer(buffer, &io.view, flags)
        except BaseException:
            free(io)
            raise
        io.has_view = 1
        io.buffer = <uint8_t *>io.view.buf
        if <uint64_t>io.view.len != io.nr_sectors * BLKIF_SECTOR_SIZE:
            text = f"a buffer of {io.view.len} bytes for {io.nr_sectors} sectors"
            self.drop(io)
            raise LocalProtocolError(text)

    def reap(self):
        """Operations that are over: a list of (token, errno), errno 0 for success."""
        cdef front_io *first = take_all(&self.q, &self.q.done)
        cdef front_io *io = first
        over = []
        while io != NULL:
            over.append((io.token, -io.error))
            io = io.next
        self.drop(first)
        return over

    def step(self, uint32_t budget=64):
        """One bounded round, as the thread runs it; STEP_* flags (1 worked, 2 broken, 4 drained)."""
        cdef uint32_t flags
        with nogil:
            flags = front_step(&self.q, budget)
        return flags

    def may_sleep(self):
        """Ask for an event and look once more; True if there is nothing to do."""
        return bool(front_may_sleep(&self.q))

    def stop(self):
        """Put nothing more on the ring; what is on it is waited for by further steps. Any thread.

        What was submitted and never put on the ring is not reaped: its owner submits it elsewhere.
        """
        self.q.stopping = 1

    @property
    def done_fd(self):
        """Readable when `reap` has something; to be read (8 bytes) before it is called."""
        return self.q.done_fd

    @property
    def in_flight(self):
        """Requests on the ring."""
        return self.q.in_flight

    @property
    def breach(self):
        """How the backend broke the protocol, or None."""
        if self.q.broken == BREACH_NONE:
            return None
        return (<bytes>blkif_breach_names[self.q.broken]).decode()

    def counters(self):
        """Everything counted, by name. Any thread."""
        counts = dict(self.q.count)
        counts["in_flight"] = self.q.in_flight
        return counts
