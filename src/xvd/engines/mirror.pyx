# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""Two storages that become the same while a guest writes: the disk's own, and a target.

Granules of 64 KiB that may differ are marked. Somebody copies them, one run after the other, from
the disk's storage to the target (`Twins`). A guest's write goes to the disk's storage, and to the
target too where that has what it replaces already, so no load keeps the two from becoming the same.
Its guest is answered when both have it, by what the disk's own storage says: whatever becomes of
the target is nothing to the guest.

A granule is not copied while a write to it is under way. The writer counts itself first and then
looks whether the granule is marked or being copied; who copies says so first and then looks whether
anybody is counted. One of the two sees the other, and a write that is seen, or sees, too late
leaves its granule marked.

Two writes at a time to one block might reach the target in another order than the disk. So a write
that goes to both claims its blocks of 4 KiB, and one that finds a block claimed waits for the next
of its queue that ends, or marks its granules if there is none. Both, claims and writers, are kept
for granules modulo `BUCKETS`: who finds a stranger's copies or writes later than it need.

A guest that changes what it is having written may have one on this and the other on that side, as
with any mirror.
"""

from libc.errno cimport EAGAIN
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.unistd cimport close
from posix.uio cimport iovec

from xvd.dataplane.abi cimport ENGINE_DISCARD, ENGINE_WRITE
from xvd.dataplane.c cimport (
    xvd_add64, xvd_clear_bits64, xvd_exchange32, xvd_fence, xvd_load64, xvd_load_acquire,
    xvd_set_bits64, xvd_store64)
from xvd.dataplane.ports cimport engine_io, engine_of, engine_ports, wrap
from xvd.engines.changes cimport (
    GRANULE_SHIFT, ChangeMap, change_map, end_granule, first_granule, is_marked, is_within, mark,
    mark_range)
from xvd.engines.channel cimport done_list, either_fd, finish, reap_list

cdef enum:
    BUCKETS = 4096
    BLOCK_SHIFT = 12             # sixteen blocks in a granule
    CLAIMS_SHIFT = 48            # of a bucket's word: its claims above, its writers below
    WRITERS = 0xffffffff
    PLACES = 2048                # requests of the largest ring: a queue has no more in flight
    PARTS = 512                  # of a write that the target gets at once, at most
    BATCH = 64
    RUN_SHIFT = 16               # of a run: its first granule above, how many they are below


# Where a write goes that begins: to the disk's own storage, or to the target too.
cdef enum how:
    ALONE = 0
    FOLLOWED = 1
    WAITS = 2


cdef struct twins:
    change_map *todo             # what may differ
    uint64_t copied              # the run that is being copied; 0: none
    uint64_t buckets[BUCKETS]
    uint32_t failed              # the errno of the target's first failure, or 0


cdef bint is_copied(const twins *t, uint64_t granule) noexcept nogil:
    cdef uint64_t run = xvd_load64(&t.copied)
    return granule - (run >> RUN_SHIFT) < (run & ((1 << RUN_SHIFT) - 1))


cdef uint64_t counted_end(uint64_t offset, uint64_t length) noexcept nogil:
    """The end of the granules by which a writer is counted: in each bucket once."""
    return min(end_granule(offset, length), first_granule(offset) + BUCKETS)


cdef uint64_t claims_in(uint64_t granule, uint64_t offset, uint64_t length) noexcept nogil:
    """The bits of the blocks of a granule that a range has part in."""
    cdef uint64_t begins = granule << GRANULE_SHIFT
    cdef uint64_t first = (max(offset, begins) - begins) >> BLOCK_SHIFT
    cdef uint64_t last = (min(offset + length, begins + (1 << GRANULE_SHIFT)) - 1
                          - begins) >> BLOCK_SHIFT
    return ((<uint64_t>2 << (last - first)) - 1) << first << CLAIMS_SHIFT


cdef void disclaim(twins *t, uint64_t offset, uint64_t length, uint64_t end) noexcept nogil:
    """Give back what was claimed in the granules before `end`."""
    cdef uint64_t granule
    for granule in range(first_granule(offset), end):
        xvd_clear_bits64(&t.buckets[granule % BUCKETS], claims_in(granule, offset, length))


cdef bint claim(twins *t, uint64_t offset, uint64_t length) noexcept nogil:
    """Claim every block of a range, or none."""
    cdef uint64_t granule, wanted, before
    for granule in range(first_granule(offset), end_granule(offset, length)):
        wanted = claims_in(granule, offset, length)
        before = xvd_set_bits64(&t.buckets[granule % BUCKETS], wanted)
        if before & wanted:
            xvd_clear_bits64(&t.buckets[granule % BUCKETS], wanted & ~before)
            disclaim(t, offset, length, granule)
            return False
    return True


cdef bint is_same(const twins *t, uint64_t offset, uint64_t length) noexcept nogil:
    """Whether the target has what the disk has there, and nobody is about to change that."""
    cdef uint64_t granule
    for granule in range(first_granule(offset), end_granule(offset, length)):
        if is_marked(t.todo, granule) or is_copied(t, granule):
            return False
    return True


cdef void leave(twins *t, uint64_t offset, uint64_t length, bint followed) noexcept nogil:
    """A write is over. followed: it went to the target as well."""
    cdef uint64_t granule
    if followed:
        disclaim(t, offset, length, end_granule(offset, length))
    for granule in range(first_granule(offset), counted_end(offset, length)):
        xvd_add64(&t.buckets[granule % BUCKETS], <uint64_t>-1)


cdef how enter(twins *t, uint64_t offset, uint64_t length, bint may_follow,
               bint may_wait) noexcept nogil:
    """A write begins, within the map, or is to be begun later: then nothing has changed. What a
    write touches that only the disk's own storage gets is marked. may_follow: whether the target
    could get it at all."""
    cdef uint64_t granule
    cdef bint claimed = (may_follow and not xvd_load_acquire(&t.failed)
                         and is_same(t, offset, length))
    if claimed and not claim(t, offset, length):
        if may_wait:
            return WAITS
        claimed = False
    for granule in range(first_granule(offset), counted_end(offset, length)):
        xvd_add64(&t.buckets[granule % BUCKETS], 1)
    xvd_fence()
    if claimed:
        if is_same(t, offset, length):
            return FOLLOWED
        disclaim(t, offset, length, end_granule(offset, length))
    mark_range(t.todo, offset, length)
    return ALONE


cdef bint has_writers(const twins *t, uint64_t granule) noexcept nogil:
    return xvd_load64(&t.buckets[granule % BUCKETS]) & WRITERS != 0


cdef bint is_free(const twins *t, uint64_t granule) noexcept nogil:
    """Whether it is to be copied, and could be now."""
    return is_marked(t.todo, granule) and not has_writers(t, granule)


cdef bint take(twins *t, uint64_t first, uint64_t count) noexcept nogil:
    """Begin to copy a run, unless somebody is writing to it."""
    cdef uint64_t granule
    xvd_store64(&t.copied, first << RUN_SHIFT | count)
    for granule in range(first, first + count):
        xvd_clear_bits64(&t.todo.words[granule >> 6], <uint64_t>1 << (granule & 63))
    xvd_fence()
    for granule in range(first, first + count):
        if has_writers(t, granule):
            put_back(t, first, count)
            return False
    return True


cdef void put_back(twins *t, uint64_t first, uint64_t count) noexcept nogil:
    """A run was not copied after all."""
    cdef uint64_t granule
    for granule in range(first, first + count):
        mark(t.todo, granule)
    xvd_store64(&t.copied, 0)


cdef void fail(twins *t, uint32_t number) noexcept nogil:
    if xvd_load_acquire(&t.failed) == 0:
        xvd_exchange32(&t.failed, number)


cdef class Twins:
    """The parts that may differ between two storages: marked in `todo`, a `ChangeMap` of `size`
    bytes. Channels write, in any thread; one thread at a time takes and copies."""

    cdef twins t
    cdef readonly ChangeMap todo
    cdef readonly uint64_t size
    cdef uint64_t cursor

    def __init__(self, ChangeMap todo not None, uint64_t size):
        self.todo, self.size = todo, size
        self.t.todo = &todo.m

    @property
    def failed(self):
        """The errno of the target's first failure, or 0; after that it is written to no more."""
        return xvd_load_acquire(&self.t.failed)

    def fail(self, uint32_t number):
        """The target has failed."""
        fail(&self.t, number)

    def take(self, uint64_t most):
        """The next run to be copied, `most` granules (1..1024) or fewer: its offset and length in
        bytes. None where there is none that nobody is writing to. `copied` or `put_back` is due."""
        cdef uint64_t granules = self.t.todo.granules, looked = 0, first, count
        most = min(max(most, <uint64_t>1), <uint64_t>1024)
        while looked < granules:
            first = self.cursor % granules if self.cursor < granules else 0
            if not is_free(&self.t, first):
                # A word of 64 that has nothing is stepped over at once.
                count = 1
                if self.t.todo.words[first >> 6] == 0:
                    count = min(64 - (first & 63), granules - first)
                looked += count
                self.cursor = first + count
                continue
            count = 1
            while count < most and first + count < granules and is_free(&self.t, first + count):
                count += 1
            self.cursor = first + count
            looked += count
            if take(&self.t, first, count):
                return first << GRANULE_SHIFT, min(count << GRANULE_SHIFT,
                                                   self.size - (first << GRANULE_SHIFT))
        return None

    def copied(self):
        """The run has been copied."""
        xvd_store64(&self.t.copied, 0)

    def put_back(self):
        """The run has not been copied, or not all of it."""
        cdef uint64_t run = xvd_load64(&self.t.copied)
        put_back(&self.t, run >> RUN_SHIFT, run & ((1 << RUN_SHIFT) - 1))

    def enter(self, uint64_t offset, uint64_t length):
        """A write that only the disk's own storage gets begins; `leave` is due."""
        enter(&self.t, offset, length, False, False)

    def leave(self, uint64_t offset, uint64_t length):
        """It has ended."""
        leave(&self.t, offset, length, False)


# ---- The channel -----------------------------------------------------------------------------

# One write or discard under way, and what the target gets of it.
cdef struct pair:
    engine_io copy
    engine_io *io                # what was asked for; its owner is this while it is below
    void *owner
    uint64_t offset, length      # of it: an engine may advance the operation
    uint32_t pending             # of its two parts, those that are not over
    how begun                    # FOLLOWED: there are two
    iovec *parts                 # of the copy; PARTS of them
    pair *next

cdef struct mirror:
    engine_ports *lower
    engine_ports *target
    twins *t
    pair *pairs
    iovec *parts
    pair *free
    uint32_t begun               # pairs that are under way
    done_list waiting            # to be begun when another has ended
    done_list done


cdef pair *pair_of(const mirror *m, const engine_io *io) noexcept nogil:
    """Our own part of an operation that comes back; NULL for one that was passed on."""
    cdef pair *found = <pair *>io.owner
    return found if m.pairs <= found and found < m.pairs + PLACES else NULL


cdef bint follows(mirror *m, pair *p) noexcept nogil:
    """Make the target's copy of a write; False where there is none to be."""
    cdef engine_io *io = p.io
    if io.op != ENGINE_WRITE or io.iovcnt > PARTS:
        return False
    memset(&p.copy, 0, sizeof(engine_io))
    memcpy(p.parts, io.iov, io.iovcnt * sizeof(iovec))
    p.copy.op, p.copy.iovcnt, p.copy.iov = io.op, io.iovcnt, p.parts
    p.copy.flags = io.flags
    p.copy.offset, p.copy.length, p.copy.owner = io.offset, io.length, p
    return True


cdef pair *begin(mirror *m, engine_io *io) noexcept nogil:
    """A write or discard within the map; NULL if it is put off."""
    cdef pair *p = m.free
    p.io, p.owner, p.offset, p.length = io, io.owner, io.offset, io.length
    p.begun = enter(m.t, p.offset, p.length, follows(m, p), m.begun > 0)
    if p.begun == WAITS:
        finish(&m.waiting, io, 0)
        return NULL
    m.free = p.next
    m.begun += 1
    p.pending = 2 if p.begun == FOLLOWED else 1
    io.owner = p
    return p


cdef void submit(void *ctx, engine_io **ios, uint32_t n) noexcept nogil:
    cdef mirror *m = <mirror *>ctx
    cdef engine_io *here[BATCH]
    cdef engine_io *copies[BATCH]
    cdef uint32_t i, good = 0, following = 0
    cdef engine_io *io
    cdef pair *p
    for i in range(n):
        io = ios[i]
        if ((io.op == ENGINE_WRITE or io.op == ENGINE_DISCARD)
                and is_within(m.t.todo, io.offset, io.length)):
            if m.free == NULL:
                finish(&m.done, io, -EAGAIN)
                continue
            p = begin(m, io)
            if p == NULL:
                continue
            if p.begun == FOLLOWED:
                copies[following] = &p.copy
                following += 1
        here[good] = io
        good += 1
        if good == BATCH:
            pass_on(m, here, good, copies, following)
            good = following = 0
    pass_on(m, here, good, copies, following)


cdef void pass_on(mirror *m, engine_io **here, uint32_t n, engine_io **copies,
                  uint32_t following) noexcept nogil:
    if n:
        m.lower.submit(m.lower.ctx, here, n)
    if following:
        m.target.submit(m.target.ctx, copies, following)


cdef void begin_waiting(mirror *m) noexcept nogil:
    """Try those again that were put off; some may be put off once more."""
    cdef engine_io *some[BATCH]
    cdef done_list them = m.waiting
    cdef uint32_t n
    m.waiting.first = m.waiting.last = NULL
    while them.first != NULL:
        n = reap_list(&them, some, BATCH)
        submit(m, some, n)


cdef engine_io *part_is_over(mirror *m, pair *p) noexcept nogil:
    """The operation, if this was the last part of it."""
    cdef engine_io *io = p.io
    p.pending -= 1
    if p.pending:
        return NULL
    if io.result < 0:
        mark_range(m.t.todo, p.offset, p.length)  # one side may have it, or some of it
    leave(m.t, p.offset, p.length, p.begun == FOLLOWED)
    m.begun -= 1
    io.owner = p.owner
    p.next = m.free
    m.free = p
    return io


cdef void reap_target(mirror *m) noexcept nogil:
    cdef engine_io *ended[BATCH]
    cdef uint32_t i, n = BATCH
    cdef engine_io *io
    cdef pair *p
    while n == BATCH:
        n = m.target.reap(m.target.ctx, ended, BATCH)
        for i in range(n):
            p = <pair *>ended[i].owner
            if ended[i].result < 0:
                mark_range(m.t.todo, p.offset, p.length)
                fail(m.t, -ended[i].result)
            io = part_is_over(m, p)
            if io != NULL:
                finish(&m.done, io, io.result)


cdef uint32_t reap_both(mirror *m, engine_io **out, uint32_t room) noexcept nogil:
    cdef uint32_t i, n, found
    cdef engine_io *io
    cdef pair *p
    reap_target(m)
    n = reap_list(&m.done, out, room)
    found = m.lower.reap(m.lower.ctx, out + n, room - n)
    for i in range(n, n + found):
        p = pair_of(m, out[i])
        io = out[i] if p == NULL else part_is_over(m, p)
        if io != NULL:
            out[n] = io
            n += 1
    return n


cdef uint32_t reap(void *ctx, engine_io **out, uint32_t room) noexcept nogil:
    cdef mirror *m = <mirror *>ctx
    cdef uint32_t n = 0, begun
    while True:
        begun = m.begun
        n += reap_both(m, out + n, room - n)
        if m.waiting.first == NULL or m.begun == begun:
            return n
        begin_waiting(m)


cdef void attach(void *ctx, void *io_uring) noexcept nogil:
    cdef mirror *m = <mirror *>ctx
    m.lower.attach(m.lower.ctx, io_uring)
    m.target.attach(m.target.ctx, io_uring)


cdef class MirrorChannel:
    """`Channel` in front of those of the disk's own storage and of the target, both of which it
    closes."""

    cdef mirror m
    cdef engine_ports table
    cdef object lower, target
    cdef Twins twins
    cdef int epoll_fd

    def __cinit__(self):
        self.epoll_fd = -1

    def __init__(self, lower, target, Twins twins not None):
        cdef uint32_t i
        if self.m.pairs != NULL:
            raise ValueError("a channel is made once")
        self.lower, self.target, self.twins = lower, target, twins
        self.m.lower, self.m.target, self.m.t = engine_of(lower), engine_of(target), &twins.t
        self.m.pairs = <pair *>calloc(PLACES, sizeof(pair))
        self.m.parts = <iovec *>calloc(<size_t>PLACES * PARTS, sizeof(iovec))
        if self.m.pairs == NULL or self.m.parts == NULL:
            raise MemoryError("no memory for a mirror's channel")
        for i in range(PLACES):
            self.m.pairs[i].parts = self.m.parts + <size_t>i * PARTS
            self.m.pairs[i].next = self.m.free
            self.m.free = &self.m.pairs[i]
        self.table.ctx = &self.m
        self.table.fd = either_fd(self.m.lower.fd, self.m.target.fd, &self.epoll_fd)
        self.table.submit = submit
        self.table.reap = reap
        self.table.attach = attach

    def __dealloc__(self):
        free(self.m.pairs)
        free(self.m.parts)
        if self.epoll_fd >= 0:
            close(self.epoll_fd)

    @property
    def ports(self):
        """Capsule ``xvd.engine_ports``."""
        return wrap(&self.table, "xvd.engine_ports")

    def close(self):
        """Close both; nothing may be in flight."""
        self.lower.close()
        self.target.close()
