# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""Clients of a disk, stepped by the thread that steps a frontend queue: nothing is handed from one
thread to another between a client's socket and the ring.

A client is somebody who has filled a `client_ports` (ports.pxd): it takes requests off its
descriptor, has the plain ones done by `submit`, and what it is refused goes the long way, by the
disk's own methods. Descriptors are polled in the same io_uring wait as everything else, and only
for a sleep: a thread that is at work looks by itself.

Operations outlive the queue. When it is over, `take_back` hands out the clients with what they have
under way; whoever they join next has it submitted again.

`Fence` is what all clients of one disk respect, on whichever queue: the disk's limits, and the
sectors on which somebody reads, changes and writes parts of blocks.
"""

from cython cimport no_gc_clear
from libc.stdint cimport int32_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from posix.uio cimport iovec
from posix.unistd cimport close, write

from xvd.dataplane.abi cimport (
    BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_READ, BLKIF_OP_WRITE, CLIENT_READS, CLIENT_WRITES,
    STEP_DRAINED, STEP_WORKED)
from xvd.dataplane.c cimport xvd_exchange32, xvd_load_acquire, xvd_store_release
from xvd.dataplane.front.place cimport displace, parts_of, place
from xvd.dataplane.front.queue cimport (
    append, front_may_sleep, front_step, let_go, pthread_mutex_lock, pthread_mutex_unlock)
from xvd.dataplane.liburing cimport (
    io_uring_get_sqe, io_uring_prep_poll_add, io_uring_sqe, io_uring_sqe_set_data64,
    io_uring_submit)
from xvd.dataplane.ports cimport client_of, engine_io, wrap

import os

from xvd.errors import LocalProtocolError

cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attr)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)

cdef extern from "poll.h" nogil:
    enum:
        POLLIN
        POLLOUT

cdef enum:
    WISHES = CLIENT_READS | CLIENT_WRITES    # the low bits of a poll's tag; the rest is the client


# ---- The fence -------------------------------------------------------------------------------

cdef bint is_held(const fence_state *f, const front_io *io) noexcept nogil:
    cdef const hold *h = f.holds
    while h != NULL:
        if io.sector_number < h.end and h.first < io.sector_number + io.nr_sectors:
            return True
        h = h.next
    return False


cdef bint is_plain(const fence_state *f, const front_io *io) noexcept nogil:
    """Whether it is whole blocks of the disk."""
    return (io.nr_sectors > 0 and io.nr_sectors <= f.sectors
            and io.sector_number <= f.sectors - io.nr_sectors
            and io.sector_number % f.block_sectors == 0 and io.nr_sectors % f.block_sectors == 0)


cdef bint may_begin(const fence_state *f, const front_io *io) noexcept nogil:
    if io.operation == BLKIF_OP_FLUSH_DISKCACHE:
        return f.flushes
    if io.operation == BLKIF_OP_READ:
        return is_plain(f, io)
    if io.operation != BLKIF_OP_WRITE:
        return False
    # One that began before its sectors were held is waited for, wherever it goes on.
    return f.writable and is_plain(f, io) and (io.guarded or not is_held(f, io))


cdef void guard(fence_state *f, front_io *io) noexcept nogil:
    io.guarded = 1
    io.before = NULL
    io.after = f.writes
    if f.writes != NULL:
        f.writes.before = io
    f.writes = io


cdef void unguard(fence_state *f, front_io *io) noexcept nogil:
    cdef uint64_t one = 1
    if io.after != NULL:
        io.after.before = io.before
    if io.before != NULL:
        io.before.after = io.after
    else:
        f.writes = io.after
    io.guarded = 0
    if f.holds != NULL:
        write(f.fd, &one, 8)


cdef bint enter(fence_state *f, front_io *io) noexcept nogil:
    """Whether an operation may begin; a write is remembered until `leave`."""
    cdef bint allowed
    pthread_mutex_lock(&f.mutex)
    allowed = may_begin(f, io)
    if allowed and io.operation == BLKIF_OP_WRITE and not io.guarded:
        guard(f, io)
    pthread_mutex_unlock(&f.mutex)
    return allowed


cdef void leave(fence_state *f, front_io *io) noexcept nogil:
    if io.guarded:
        pthread_mutex_lock(&f.mutex)
        unguard(f, io)
        pthread_mutex_unlock(&f.mutex)


@no_gc_clear
cdef class Fence:
    """What every client of a disk respects. The methods by one thread; nothing is allowed yet."""

    def __init__(self):
        if self.f.block_sectors:
            raise LocalProtocolError("a fence is made once")
        self.f.block_sectors = 1
        pthread_mutex_init(&self.f.mutex, NULL)
        self.f.fd = -1

    def __dealloc__(self):
        cdef hold *h
        if self.f.block_sectors == 0:
            return
        while self.f.holds != NULL:
            h = self.f.holds
            self.f.holds = h.next
            free(h)
        if self.f.fd >= 0:
            close(self.f.fd)
        pthread_mutex_destroy(&self.f.mutex)

    def allow(self, *, uint64_t sectors, uint32_t block_sectors, bint writable, bint flushes):
        """What the disk is from now on: its size and its block, in sectors of 512 bytes; whether it
        takes writes, and flushes."""
        if block_sectors == 0:
            raise LocalProtocolError("a block has at least one sector")
        pthread_mutex_lock(&self.f.mutex)
        self.f.sectors = sectors
        self.f.block_sectors = block_sectors
        self.f.writable = writable
        self.f.flushes = flushes
        pthread_mutex_unlock(&self.f.mutex)

    def hold(self, uint64_t first, uint64_t end):
        """Let no client's write begin on the sectors from `first` to before `end`; a token."""
        cdef hold *h
        if self.f.fd < 0:
            self.f.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        h = <hold *>calloc(1, sizeof(hold))
        if h == NULL:
            raise MemoryError("no memory for a hold")
        self.last += 1
        h.first, h.end, h.token = first, end, self.last
        pthread_mutex_lock(&self.f.mutex)
        h.next = self.f.holds
        self.f.holds = h
        pthread_mutex_unlock(&self.f.mutex)
        return self.last

    def busy(self, uint64_t token):
        """Whether a write that began before is still under way on the sectors held."""
        cdef const hold *h
        cdef const front_io *io
        cdef bint found = False
        pthread_mutex_lock(&self.f.mutex)
        h = self.f.holds
        while h != NULL and h.token != token:
            h = h.next
        io = self.f.writes if h != NULL else NULL
        while io != NULL and not found:
            found = io.sector_number < h.end and h.first < io.sector_number + io.nr_sectors
            io = io.after
        pthread_mutex_unlock(&self.f.mutex)
        return found

    def release(self, uint64_t token):
        """Let clients write there again. With the last one `fd` is closed."""
        cdef hold *found = NULL
        cdef hold **at = &self.f.holds
        pthread_mutex_lock(&self.f.mutex)
        while at[0] != NULL:
            if at[0].token == token:
                found = at[0]
                at[0] = found.next
                break
            at = &at[0].next
        if self.f.holds == NULL and self.f.fd >= 0:
            close(self.f.fd)
            self.f.fd = -1
        pthread_mutex_unlock(&self.f.mutex)
        free(found)

    @property
    def fd(self):
        """Readable (8 bytes) when a write has ended since something was held; -1 while nothing
        is."""
        return self.f.fd


# ---- The clients of one queue ----------------------------------------------------------------

cdef int submit(void *ctx, front_io *io) noexcept nogil:
    cdef client_set *c = <client_set *>ctx
    if c.queue == NULL or not enter(c.fence, io):
        leave(c.fence, io)
        return 0
    io.borrowed = 1
    io.started = 0
    io.issued = 0
    io.error = 0
    io.next_page = io.first_page
    io.outstanding = 0
    append(&c.queue.queued, io)
    return 1


cdef int place_on(void *ctx, front_io *io) noexcept nogil:
    cdef client_set *c = <client_set *>ctx
    if c.queue == NULL or not place(c.queue, io):
        return 0
    io.host = &c.host
    return 1


cdef void displace_from(void *ctx, front_io *io) noexcept nogil:
    displace((<client_set *>ctx).queue, io)


cdef uint32_t parts_on(void *ctx, const front_io *io, uint64_t offset, uint64_t size, iovec *parts,
                       uint32_t room) noexcept nogil:
    return parts_of(&(<client_set *>ctx).queue.pool, io, offset, size, parts, room)


cdef void welcome(client_set *c) noexcept nogil:
    """Take in who has joined; what they have under way goes on."""
    cdef client_ports *client
    cdef client_ports *following
    if not xvd_load_acquire(&c.news):
        return
    pthread_mutex_lock(&c.mutex)
    xvd_store_release(&c.news, 0)
    client = c.joining
    c.joining = NULL
    pthread_mutex_unlock(&c.mutex)
    while client != NULL:
        following = client.next
        client.next = c.first
        c.first = client
        if c.queue != NULL:
            client.resume(client.ctx, &c.host)
        client = following


cdef uint32_t step_clients(client_set *c) noexcept nogil:
    """A step of each; who is over is let go of, when no poll refers to it any more."""
    cdef client_ports **at = &c.first
    cdef client_ports *client
    cdef uint32_t flags, worked = 0
    while at[0] != NULL:
        client = at[0]
        flags = client.step(client.ctx, &c.host)
        worked |= flags & STEP_WORKED
        if flags & STEP_DRAINED and client.waiting == 0:
            at[0] = client.next
            client.left(client.ctx)
        else:
            at = &client.next
    return worked


cdef void hand_back(client_set *c) noexcept nogil:
    cdef front_io *io = c.queue.returned.first
    cdef front_io *following
    c.queue.returned.first = c.queue.returned.last = NULL
    while io != NULL:
        following = io.next
        leave(c.fence, io)
        io.client.completed(io.client.ctx, io)
        io = following


cdef uint32_t step(void *ctx, uint32_t budget) noexcept nogil:
    """Clients first: what they bring goes on the ring at once, and what was answered before goes to
    them while the backend works."""
    cdef client_set *c = <client_set *>ctx
    cdef uint32_t flags
    welcome(c)
    flags = step_clients(c)
    if c.queue != NULL:
        flags |= front_step(c.queue, budget)
        hand_back(c)
    return flags


cdef bint poll(client_set *c, client_ports *client, uint32_t wish, uint32_t mask) noexcept nogil:
    """Let the loop's wait end when the descriptor is ready; False: there was no room to say so."""
    cdef io_uring_sqe *sqe = io_uring_get_sqe(c.ring)
    if sqe == NULL:
        io_uring_submit(c.ring)
        return False
    io_uring_prep_poll_add(sqe, client.fd, mask)
    io_uring_sqe_set_data64(sqe, <uint64_t><uintptr_t>client | wish)
    client.waiting |= wish
    return True


cdef int may_sleep(void *ctx) noexcept nogil:
    cdef client_set *c = <client_set *>ctx
    cdef client_ports *client = c.first
    cdef uint32_t wishes
    if c.queue != NULL and not front_may_sleep(c.queue):
        return 0
    while client != NULL:
        wishes = client.wishes(client.ctx) & ~client.waiting
        if wishes & CLIENT_READS and not poll(c, client, CLIENT_READS, POLLIN):
            return 0
        if wishes & CLIENT_WRITES and not poll(c, client, CLIENT_WRITES, POLLOUT):
            return 0
        client = client.next
    return 1


cdef void attach(void *ctx, void *ring) noexcept nogil:
    (<client_set *>ctx).ring = <io_uring *>ring


cdef void polled(void *ctx, engine_io *tag, int32_t res) noexcept nogil:
    cdef uintptr_t value = <uintptr_t>tag
    (<client_ports *>(value & ~<uintptr_t>WISHES)).waiting &= ~<uint32_t>(value & WISHES)


@no_gc_clear  # the queue's lists lead into the clients' memory
cdef class Clients:
    """Run by a `Loop` in place of the queue. `step` by one thread; the rest by one other.

    queue: None makes a waiting room, for as long as there is no queue: its clients are served, and
    each of their operations goes the long way.
    """

    def __init__(self, Fence fence not None, FrontQueue queue=None):
        if self.members is not None:
            raise LocalProtocolError("a set of clients is made once")
        self.members = {}
        self.fence = fence
        self.queue = queue
        self.c.fence = &fence.f
        self.c.host.ctx = &self.c
        self.c.host.submit = submit
        self.c.host.place = place_on
        self.c.host.displace = displace_from
        self.c.host.parts = parts_on
        pthread_mutex_init(&self.c.mutex, NULL)
        if queue is None:
            return
        self.c.queue = &queue.q
        self.poller.ctx = &self.c
        self.poller.fd = -1
        self.poller.attach = attach
        self.poller.complete = polled
        self.table.ctx = &self.c
        self.table.step = step
        self.table.may_sleep = may_sleep
        self.table.events = queue.table.events
        self.table.engine = &self.poller

    def __dealloc__(self):
        if self.members is not None:
            if self.c.queue != NULL:
                let_go(self.c.queue)
            pthread_mutex_destroy(&self.c.mutex)

    @property
    def ports(self):
        """Capsule ``xvd.stepper_ports``, for a `Loop`; only with a queue."""
        if self.queue is None:
            raise LocalProtocolError("a waiting room has no loop")
        return wrap(&self.table, "xvd.stepper_ports")

    def __len__(self):
        return len(self.members)

    def join(self, client):
        """Serve a client from now on; the stepping thread is to be woken for it.

        client: an object with the client's capsule as ``ports``; kept until `forget`.
        """
        cdef client_ports *ports = client_of(client)
        self.members[<uintptr_t>ports] = client
        pthread_mutex_lock(&self.c.mutex)
        ports.waiting = 0
        ports.next = self.c.joining
        self.c.joining = ports
        xvd_exchange32(&self.c.news, 1)
        pthread_mutex_unlock(&self.c.mutex)

    def forget(self, client):
        """Let go of a client that has left."""
        self.members.pop(<uintptr_t>client_of(client), None)

    def take_back(self):
        """The clients that have not left, with what they have under way. Only when nothing steps
        the queue any more, and nothing will."""
        cdef client_ports *client
        if self.c.queue != NULL:
            let_go(self.c.queue)
        with nogil:
            welcome_nobody(&self.c)
        found = []
        client = self.c.first
        while client != NULL:
            client.displaced(client.ctx)
            found.append(self.members[<uintptr_t>client])
            client = client.next
        self.c.first = NULL
        self.members.clear()
        return found

    def give_up(self):
        """There will be no queue again: what is under way goes the long way. A waiting room's."""
        cdef client_ports *client
        with nogil:
            welcome_nobody(&self.c)
            client = self.c.first
            while client != NULL:
                client.resume(client.ctx, &self.c.host)
                client = client.next

    def step(self, uint32_t budget=64):
        """One round, as the thread runs it; its `StepFlag`s."""
        cdef uint32_t flags
        with nogil:
            flags = step(&self.c, budget)
        return flags

    def wishes(self):
        """What the clients wait for, as a list of (descriptor, 1 readable + 2 writable)."""
        cdef client_ports *client = self.c.first
        found = []
        while client != NULL:
            found.append((client.fd, client.wishes(client.ctx)))
            client = client.next
        return found

    def stop(self):
        """Put nothing more on the ring; what is on it is waited for by further steps."""
        self.queue.stop()


cdef void welcome_nobody(client_set *c) noexcept nogil:
    """Take in who has joined, and leave what they have under way as it is."""
    cdef front_queue *queue = c.queue
    c.queue = NULL
    welcome(c)
    c.queue = queue
