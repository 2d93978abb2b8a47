# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""The frontend's queue: a state machine with one step.

A caller's operation of any length waits in `incoming`; `issue` (issue.pxd) makes ring
requests of what waits as slots and pages become free, copies written data into granted pages
(pool.pxd), and remembers each request in a private shadow; `take_responses`
(answer.pxd) checks every response against the shadow, copies read data out, gives the pages
back, and hands the operation over when its last part is done.

The backend is not believed: it may send what it likes, and breaks only its own device.
"""

from cython cimport no_gc_clear
from cpython.buffer cimport (PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer)
from libc.stdlib cimport calloc, free
from posix.unistd cimport close

from xvd.dataplane.abi cimport (
    BLKIF_FLAG_DIVISIBLE, BLKIF_MAX_INDIRECT_SEGMENTS, BLKIF_MAX_SEGMENTS_PER_REQUEST,
    BLKIF_OP_READ, BLKIF_OP_WRITE_BARRIER, BLKIF_SECTORS_PER_PAGE, BLKIF_SECTOR_SIZE, BREACH_NONE,
    STEP_BROKEN, STEP_DRAINED, STEP_WORKED, blkif_breach_names, blkif_layouts, blkif_operations)
from xvd.dataplane.c cimport monotonic_ns, xvd_load64
from xvd.dataplane.front.answer cimport end_parts, take_responses
from xvd.dataplane.front.issue cimport indirect_pages, issue, pages_of_unit
from xvd.dataplane.front.place cimport in_place_most
from xvd.dataplane.front.pool cimport close_pool, end_idle_grants, open_pool
from xvd.dataplane.latency cimport kind_figures, latency_lists, latency_sums
from xvd.dataplane.ports cimport events_of, front_io, granter_of, wrap
from xvd.dataplane.ring.ring cimport (
    check_ring, front_final_check, front_has_news, front_push, gap_of)

import os

from xvd.errors import LocalProtocolError

cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attr)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)

cdef enum:
    BARRIER_SECTORS_MAX = BLKIF_MAX_SEGMENTS_PER_REQUEST * BLKIF_SECTORS_PER_PAGE


cdef front_io *take_all(front_queue *q, io_list *ios) noexcept nogil:
    """Empty one of the lists that the mutex guards; its first."""
    cdef front_io *first
    pthread_mutex_lock(&q.mutex)
    first = ios.first
    ios.first = ios.last = NULL
    pthread_mutex_unlock(&q.mutex)
    return first


cdef void accept(front_queue *q) noexcept nogil:
    cdef front_io *io
    cdef front_io *following
    if xvd_load64(&q.incoming.first) == 0:
        return                   # without the lock, in every step of an idle queue
    io = take_all(q, &q.incoming)
    while io != NULL:
        following = io.next
        append(&q.queued, io)
        io = following


cdef uint32_t front_step(void *ctx, uint32_t budget) noexcept nogil:
    """One bounded round; STEP_* flags."""
    cdef front_queue *q = <front_queue *>ctx
    cdef uint32_t taken, issued = 0
    q.count.steps += 1
    q.now_ns = monotonic_ns()
    if q.broken:
        return STEP_BROKEN | STEP_DRAINED
    taken = take_responses(q, budget)
    if q.broken:
        return STEP_BROKEN | STEP_DRAINED
    if q.scan:
        q.scan = 0
        end_idle_grants(&q.pool)
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


cdef int front_peek(void *ctx) noexcept nogil:
    cdef front_queue *q = <front_queue *>ctx
    return (front_has_news(&q.ring) or xvd_load64(&q.incoming.first) != 0)


cdef void drop(front_io *io) noexcept with gil:
    """Give up operations of ours; what was borrowed is its owner's again."""
    cdef front_io *following
    while io != NULL:
        following = io.next
        if io.has_view:
            PyBuffer_Release(&io.view)
        if not io.borrowed:
            free(io)
        io = following


cdef void forget_operations(front_queue *q) noexcept nogil:
    """Forget every operation, when nothing steps the queue any more and nothing will.

    The backend may still fill our pages; nothing is copied out of them again.
    """
    cdef uint32_t id
    for id in range(q.ring.nr_ents):
        if q.shadows[id].io != NULL:
            end_parts(q, &q.shadows[id], 0)
            q.shadows[id].io = NULL
    drop(take_all(q, &q.incoming))
    drop(take_all(q, &q.done))
    drop(q.queued.first)
    drop(q.returned.first)
    q.queued.first = q.queued.last = NULL
    q.returned.first = q.returned.last = NULL


@no_gc_clear  # what was lent must outlive the lists that lead into it
cdef class FrontQueue:
    """One queue of one disk. `step` by one thread; `submit` and `reap` by any other.

    ring: writable buffer over our own ring pages, initialised (`FrontRing.init`) before they were
    published. abi: number of `blkif.abi.Abi`. pages: the object with the granter's capsule, of the
    machine that has the ring's pages; at least as many as `pages_needed` says. events: with the
    event channel's. options: a `FrontOptions`. Requests are whole blocks, and with larger guest
    pages whole ones of these; where a request has less than one, several go on the ring together.
    Bytes that are not data are cleared before a backend that is not trusted may see them (XSA-403).
    """

    def __init__(self, ring, uint32_t nr_ents, int abi, pages, events, options):
        cdef uint8_t[::1] page = ring
        cdef uint32_t i, block_sectors = options.block_sectors
        cdef uint32_t wire_sector = options.wire_sector
        if self.q.shadows != NULL:
            raise LocalProtocolError("a queue is made once")
        check_ring(page.shape[0], nr_ents, abi, granter_of(pages).stride)
        self.keep = (ring, pages, events)
        self.set_limits(granter_of(pages).count, options.segments_max, block_sectors,
                        options.page_grants)
        if wire_sector not in (1, block_sectors) or wire_sector > BLKIF_SECTORS_PER_PAGE:
            raise LocalProtocolError("sectors on the ring are of 512 bytes or a block, and at "
                                     f"most a page, not {wire_sector * BLKIF_SECTOR_SIZE} bytes")
        self.q.wire_sector = wire_sector
        self.q.events = events_of(events)
        self.q.handle = options.handle
        self.q.wipe = not options.trusted
        self.q.ring.sring = &page[0]
        self.q.ring.gap = gap_of(nr_ents, abi, granter_of(pages).stride)
        self.q.ring.nr_ents = nr_ents
        self.q.ring.layout = &blkif_layouts[abi]
        self.q.done_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        pthread_mutex_init(&self.q.mutex, NULL)
        self.q.shadows = <shadow *>calloc(nr_ents, sizeof(shadow))
        self.q.free_ids = <uint32_t *>calloc(nr_ents, sizeof(uint32_t))
        if (not self.q.shadows or not self.q.free_ids
                or not open_pool(&self.q.pool, granter_of(pages), options.persistent)):
            raise MemoryError(f"no memory for a queue of {nr_ents} requests")
        self.q.unit_pages = pages_of_unit(&self.q, self.q.unit_sectors, False)
        self.q.pool.in_place_max = in_place_most(&self.q)
        for i in range(nr_ents):
            self.q.free_ids[i] = nr_ents - 1 - i
        self.q.nr_free = nr_ents
        self.table.ctx = &self.q
        self.table.step = front_step
        self.table.may_sleep = front_may_sleep
        self.table.peek = front_peek
        self.table.events = self.q.events
        self.table.engine = NULL
        self.table.outstanding = &self.q.in_flight

    cdef set_limits(self, uint32_t pages, uint32_t segments_max, uint32_t block_sectors,
                    uint32_t page_grants):
        cdef uint32_t needed = FrontQueue.pages_needed(segments_max, page_grants)
        cdef uint32_t sectors = segments_max * BLKIF_SECTORS_PER_PAGE
        cdef uint32_t whole = page_grants * BLKIF_SECTORS_PER_PAGE
        if needed > pages:
            raise LocalProtocolError(f"{pages} pages are too few for {segments_max} segments: "
                                     f"{needed} are needed")
        if block_sectors == 0 or sectors < block_sectors:
            raise LocalProtocolError(f"{segments_max} segments hold no block of {block_sectors} "
                                     "sectors")
        self.q.sectors_max = sectors // block_sectors * block_sectors
        self.q.unit_sectors = self.q.sectors_max
        if page_grants > 1:
            self.q.unit_sectors = max(sectors, whole) // whole * whole
            self.q.unit_sectors -= self.q.unit_sectors % block_sectors
            self.q.sectors_max = min(self.q.sectors_max, self.q.unit_sectors)

    @staticmethod
    def pages_needed(uint32_t segments_max, uint32_t page_grants=1):
        """Pages that a queue of such requests needs to put anything on the ring, in whole ones."""
        if not 1 <= segments_max <= BLKIF_MAX_INDIRECT_SEGMENTS:
            raise LocalProtocolError(f"a request has 1 to {BLKIF_MAX_INDIRECT_SEGMENTS} segments, "
                                     f"not {segments_max}")
        if page_grants not in (1, 4, 16):
            raise LocalProtocolError(f"a page has 1, 4 or 16 grants, not {page_grants}")
        segments = max(segments_max, page_grants)
        needed = segments + indirect_pages(min(segments, segments_max))
        return (needed + page_grants - 1) // page_grants * page_grants

    def __dealloc__(self):
        if self.q.shadows == NULL:
            return
        forget_operations(&self.q)
        close(self.q.done_fd)
        pthread_mutex_destroy(&self.q.mutex)
        close_pool(&self.q.pool)
        free(self.q.shadows)
        free(self.q.free_ids)

    cdef lend(self, object memory):
        """Keep the memory that borrowed operations lie in for as long as the queue may see them."""
        self.keep += (memory,)

    @property
    def ports(self):
        """Capsule ``xvd.stepper_ports``, for a `Loop`."""
        return wrap(&self.table, "xvd.stepper_ports")

    def submit(self, int operation, uint64_t sector_number, uint64_t nr_sectors, buffer,
               uint64_t token, *, uint8_t flag=0):
        """Queue an operation; True if the stepping thread must be woken for it.

        operation: READ 0, WRITE 1, WRITE_BARRIER 2, FLUSH_DISKCACHE 3 or DISCARD 5. buffer: for
        reads a writable, for writes and barriers any buffer of exactly ``nr_sectors * 512`` bytes,
        locked until reaped. A barrier may have no sectors, and at most as many as one direct
        request takes. token: is given back by `reap`. flag: of a discard, 1 for a secure one.
        """
        cdef front_io *io
        cdef bint first
        self.check(operation, nr_sectors)
        io = <front_io *>calloc(1, sizeof(front_io))
        if io == NULL:
            raise MemoryError("no memory for an operation")
        io.operation = operation
        io.flag = flag
        io.sector_number = sector_number
        io.nr_sectors = nr_sectors
        io.token = token
        if has_data(io):
            self.lock_buffer(io, buffer)
        pthread_mutex_lock(&self.q.mutex)
        first = self.q.incoming.first == NULL
        append(&self.q.incoming, io)
        pthread_mutex_unlock(&self.q.mutex)
        return first

    cdef check(self, int operation, uint64_t nr_sectors):
        if not 0 <= operation < 256 or blkif_operations[operation].nr_asked == 0:
            raise LocalProtocolError(f"operation {operation} is none of read, write, barrier, flush"
                                     " and discard")
        if blkif_operations[operation].flags & BLKIF_FLAG_DIVISIBLE and nr_sectors == 0:
            raise LocalProtocolError("a read or write has at least one sector")
        if operation == BLKIF_OP_WRITE_BARRIER and nr_sectors > self.barrier_sectors_max:
            raise LocalProtocolError(f"a barrier has at most {self.barrier_sectors_max} sectors, "
                                     f"not {nr_sectors}")

    @property
    def barrier_sectors_max(self):
        """Sectors of the largest barrier: it cannot be split, and has no indirect form."""
        return min(self.q.sectors_max, <uint32_t>BARRIER_SECTORS_MAX)

    cdef lock_buffer(self, front_io *io, object buffer):
        cdef int flags = PyBUF_WRITABLE if io.operation == BLKIF_OP_READ else PyBUF_SIMPLE
        try:
            PyObject_GetBuffer(buffer, &io.view, flags)
        except BaseException:
            free(io)
            raise
        io.has_view = 1
        io.buffer = <uint8_t *>io.view.buf
        if <uint64_t>io.view.len != io.nr_sectors * BLKIF_SECTOR_SIZE:
            text = f"a buffer of {io.view.len} bytes for {io.nr_sectors} sectors"
            drop(io)
            raise LocalProtocolError(text)

    def reap(self):
        """Operations that are over: a list of (token, errno), errno 0 for success."""
        cdef front_io *first = take_all(&self.q, &self.q.done)
        cdef front_io *io = first
        over = []
        while io != NULL:
            over.append((io.token, -io.error))
            io = io.next
        drop(first)
        return over

    def step(self, uint32_t budget=64):
        """One bounded round, as the thread runs it; its `StepFlag`s."""
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

    def scan(self):
        """Let the next step end the idle grants that the backend has let go of. Any thread.

        For persistent grants, every 10 seconds (Linux 4b422cb9).
        """
        self.q.scan = self.q.pool.persistent

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
        """Everything counted, by name. Any thread.

        granted, revoked: grants made and ended; reused: persistent grants found in place. placed:
        pages that operations keep their data in, as of now.
        """
        counts = kind_figures(&self.q.kinds) | dict(self.q.count)
        del counts["ds_sect"]  # of ours only: the backend's word
        counts["granted"] = self.q.pool.grants
        counts["revoked"] = self.q.pool.ended
        counts["reused"] = self.q.pool.reused
        counts["placed"] = self.q.pool.in_place
        counts["in_flight"] = self.q.in_flight
        counts["latency_ns"] = latency_sums(&self.q.latency)
        return counts

    def latency(self):
        """How long the backend took for requests of each kind: lists of 40 counts.

        Count i is of the answers that came after 2**i nanoseconds and before twice that; the last
        is of all that took longer. Any thread.
        """
        return latency_lists(&self.q.latency)
