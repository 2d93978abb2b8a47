# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""A load on a frontend queue, kept up by the thread that steps it: no Python in what is measured.

`depth` operations of one size are always under way; each one that ends starts the next at a place
drawn by a small generator of known sequence (xorshift64*), so that a seed means the same load on
every machine, or at the next place.

With `in_place` the operations' data stays in granted pages, as a guest's would that has nothing
between its application and the ring: neither end of the load touches more than its first bytes.

With `verify` what is written is a function of its place alone, whatever the order of the writes,
and what is read has to be that.
"""

from libc.errno cimport EILSEQ
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy
from posix.time cimport CLOCK_THREAD_CPUTIME_ID, clock_gettime, timespec

from xvd.dataplane.abi cimport (
    BLKIF_OP_READ, BLKIF_OP_WRITE, BLKIF_SECTOR_SIZE, STEP_DRAINED, XEN_PAGE_SIZE)
from xvd.dataplane.c cimport monotonic_ns
from xvd.dataplane.front.place cimport place
from xvd.dataplane.front.pool cimport page_data
from xvd.dataplane.front.queue cimport (
    FrontQueue, append, front_may_sleep, front_peek, front_queue, front_step)
from xvd.dataplane.ports cimport front_io, stepper_ports, wrap

from xvd.errors import LocalProtocolError


cdef struct load:
    front_queue *queue
    front_io *ios
    uint8_t *data
    uint32_t depth
    uint32_t sectors             # of one operation
    uint64_t places              # how many such fit the disk
    uint32_t write_percent
    uint32_t sequential
    uint32_t verify
    uint64_t pattern             # of the data, with `verify`
    uint64_t next_place
    uint64_t random
    uint64_t wanted              # operations to start altogether
    uint64_t started, ended, errors
    uint64_t checksum            # of the first bytes of what was read
    uint64_t begun_ns, ended_ns  # of the first step and the last
    uint64_t cpu_ns              # of the thread, between the two


cdef uint64_t draw(load *l) noexcept nogil:
    l.random ^= l.random >> 12
    l.random ^= l.random << 25
    l.random ^= l.random >> 27
    return l.random * <uint64_t>0x2545F4914F6CDD1D


cdef uint64_t cpu_now() noexcept nogil:
    cdef timespec at
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &at)
    return <uint64_t>at.tv_sec * 1000000000 + at.tv_nsec


cdef inline uint64_t word(const load *l, uint64_t at) noexcept nogil:
    """What the eight bytes at `at` (bytes, from the disk's beginning) hold."""
    return (at ^ l.pattern) * <uint64_t>0x9E3779B97F4A7C15


cdef void fill(load *l, front_io *io) noexcept nogil:
    cdef uint64_t *words = <uint64_t *>io.buffer
    cdef uint64_t first = io.sector_number * BLKIF_SECTOR_SIZE, i
    for i in range(io.nr_sectors * (BLKIF_SECTOR_SIZE // 8)):
        words[i] = word(l, first + i * 8)


cdef void verify(load *l, front_io *io) noexcept nogil:
    cdef const uint64_t *words = <const uint64_t *>io.buffer
    cdef uint64_t first = io.sector_number * BLKIF_SECTOR_SIZE, i
    for i in range(io.nr_sectors * (BLKIF_SECTOR_SIZE // 8)):
        if words[i] != word(l, first + i * 8):
            io.error = -EILSEQ
            return


cdef uint64_t next_place(load *l) noexcept nogil:
    if not l.sequential:
        return (draw(l) >> 11) % l.places
    l.next_place += 1
    return (l.next_place - 1) % l.places


cdef void start(load *l, front_io *io) noexcept nogil:
    io.operation = BLKIF_OP_WRITE if (draw(l) >> 32) % 100 < l.write_percent else BLKIF_OP_READ
    io.sector_number = next_place(l) * l.sectors
    io.queue.issued = 0
    io.queue.started = 0
    io.error = 0
    io.queue.next_page = io.first_page
    if l.verify and io.operation == BLKIF_OP_WRITE:
        fill(l, io)
    append(&l.queue.queued, io)
    l.started += 1


cdef inline uint64_t first_word(const load *l, const front_io *io) noexcept nogil:
    return (<uint64_t *>(page_data(&l.queue.pool, io.first_page) if io.in_place else io.buffer))[0]


cdef void go_on(load *l) noexcept nogil:
    """Count what has ended and put the next in its place."""
    cdef front_io *io = l.queue.returned.first
    cdef front_io *following
    l.queue.returned.first = l.queue.returned.last = NULL
    while io != NULL:
        following = io.next
        l.ended += 1
        if l.verify and io.operation == BLKIF_OP_READ and io.error == 0:
            verify(l, io)
        l.errors += io.error != 0
        l.checksum += first_word(l, io)
        if l.started < l.wanted:
            start(l, io)
        io = following


cdef uint32_t step(void *ctx, uint32_t budget) noexcept nogil:
    cdef load *l = <load *>ctx
    cdef uint32_t flags
    if l.begun_ns == 0:
        l.begun_ns = monotonic_ns()
        l.cpu_ns = cpu_now()
    flags = front_step(l.queue, budget)
    go_on(l)
    if l.ended == l.wanted and l.ended_ns == 0:
        l.ended_ns = monotonic_ns()
        l.cpu_ns = cpu_now() - l.cpu_ns
    if l.ended == l.wanted:
        return flags | STEP_DRAINED
    return flags


cdef int may_sleep(void *ctx) noexcept nogil:
    return front_may_sleep((<load *>ctx).queue)


cdef int peek(void *ctx) noexcept nogil:
    return front_peek((<load *>ctx).queue)


cdef class Load:
    """Run by a `Loop` in place of the queue: `Loop(Load(queue, ...)).run()` returns at the end.

    size: bytes of one operation, a multiple of 512. span: bytes of the disk it may touch.
    write_percent: 0 to 100. sequential: one place after the other, from `first` (bytes, a multiple
    of `size`) on, and round again. What it writes is drawn from the seed too, so that the checksum
    of a later read tells that data moved; with verify (the number of a pattern, not 0) it is what
    the pattern says of its place, and what is read and is not that counts as an error. in_place:
    nothing is copied at this end; not with verify, and only with persistent grants and enough
    pages.
    """

    cdef load l
    cdef stepper_ports table
    cdef FrontQueue queue

    def __init__(self, FrontQueue queue, *, uint32_t depth, uint32_t size, uint64_t span,
                 uint64_t operations, uint32_t write_percent=0, uint64_t seed=1,
                 bint sequential=False, uint64_t first=0, uint64_t verify=0, bint in_place=False):
        cdef uint32_t i
        if size == 0 or size % BLKIF_SECTOR_SIZE or span < size or depth == 0 or operations == 0:
            raise LocalProtocolError(f"no load of {operations} x {size} bytes, {depth} deep, "
                                     f"on {span} bytes")
        if self.l.ios != NULL:
            raise LocalProtocolError("a load is made once")
        self.queue = queue
        self.l.queue = &queue.q
        self.l.depth = depth
        self.l.sectors = size // BLKIF_SECTOR_SIZE
        self.l.places = span // size
        self.l.write_percent = write_percent
        self.l.random = seed or 1
        self.l.wanted = operations
        self.l.sequential = sequential
        self.l.next_place = first // size
        self.l.verify = verify != 0
        self.l.pattern = verify * <uint64_t>0xD1B54A32D192ED03
        # Lent to the queue: it may come to an end with operations of ours on its lists.
        memory = bytearray(<size_t>depth * (sizeof(front_io) + size))
        queue.lend(memory)
        self.l.ios = <front_io *><char *>memory
        self.l.data = <uint8_t *><char *>memory + depth * sizeof(front_io)
        for i in range(depth * (size // 8)):
            (<uint64_t *>self.l.data)[i] = draw(&self.l)
        for i in range(min(<uint64_t>depth, operations)):
            self.l.ios[i].borrowed = 1
            self.l.ios[i].nr_sectors = self.l.sectors
            self.l.ios[i].buffer = self.l.data + <size_t>i * size
            if in_place:
                self.place(&self.l.ios[i])
            start(&self.l, &self.l.ios[i])
        self.table.ctx = &self.l
        self.table.step = step
        self.table.may_sleep = may_sleep
        self.table.peek = peek
        self.table.events = queue.table.events
        self.table.engine = NULL

    cdef place(self, front_io *io):
        """Its data in granted pages for as long as the load goes on, what it writes with them."""
        cdef uint64_t size = io.nr_sectors * BLKIF_SECTOR_SIZE, at
        cdef uint32_t page
        if self.l.verify or not place(self.l.queue, io):
            left = self.l.queue.pool.in_place_max - self.l.queue.pool.in_place
            raise LocalProtocolError(
                f"{size} bytes have no place in granted pages, of which {left} are to be had: that "
                "needs persistent grants, a larger pool (pool_pages) or a smaller depth, and no "
                "verifying")
        page = io.first_page
        for at in range(0, size, XEN_PAGE_SIZE):
            memcpy(page_data(&self.l.queue.pool, page), io.buffer + at,
                   min(<uint64_t>XEN_PAGE_SIZE, size - at))
            page = self.l.queue.pool.next[page]

    @property
    def ports(self):
        """Capsule ``xvd.stepper_ports``, for a `Loop`."""
        return wrap(&self.table, "xvd.stepper_ports")

    def step(self, uint32_t budget=64):
        """One bounded round, as the thread runs it; its `StepFlag`s."""
        cdef uint32_t flags
        with nogil:
            flags = step(&self.l, budget)
        return flags

    def stop(self):
        """End early: what is on the ring is waited for. Any thread."""
        self.l.wanted = self.l.started
        self.queue.stop()

    @property
    def result(self):
        """(operations ended, errors, checksum of what was read)."""
        return self.l.ended, self.l.errors, self.l.checksum

    @property
    def times(self):
        """(first step, last step, CPU between them): nanoseconds, the first two monotonic."""
        return self.l.begun_ns, self.l.ended_ns, self.l.cpu_ns
