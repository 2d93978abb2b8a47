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
"""

from cython cimport no_gc_clear
from libc.stdint cimport int32_t, uint32_t, uint64_t, uintptr_t
from posix.uio cimport iovec

from xvd.dataplane.abi cimport (
    BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_READ, BLKIF_OP_WRITE, CLIENT_READS, CLIENT_WRITES,
    STEP_DRAINED, STEP_WORKED)
from xvd.dataplane.c cimport xvd_exchange32, xvd_load_acquire, xvd_store_release
from xvd.dataplane.front.place cimport displace, parts_of, place
from xvd.dataplane.front.queue cimport (
    append, forget_operations, front_may_sleep, front_step, pthread_mutex_lock,
    pthread_mutex_unlock)
from xvd.dataplane.front.range_lock cimport RangeLock, enter_lock, leave_lock
from xvd.dataplane.liburing cimport (
    io_uring_get_sqe, io_uring_prep_poll_add, io_uring_sqe, io_uring_sqe_set_data64,
    io_uring_submit)
from xvd.dataplane.ports cimport client_of, completion, wrap

from xvd.errors import LocalProtocolError

cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attr)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)

cdef extern from "poll.h" nogil:
    enum:
        POLLIN
        POLLOUT

cdef int submit(void *ctx, front_io *io) noexcept nogil:
    cdef client_set *c = <client_set *>ctx
    if c.queue == NULL or not enter_lock(c.lock, io):
        leave_lock(c.lock, io)
        return 0
    io.borrowed = 1
    io.queue.started = 0
    io.queue.issued = 0
    io.error = 0
    io.queue.next_page = io.first_page
    io.queue.outstanding = 0
    append(&c.queue.queued, io)
    return 1


cdef int place_on(void *ctx, front_io *io) noexcept nogil:
    cdef client_set *c = <client_set *>ctx
    if c.queue == NULL or not place(c.queue, io):
        return 0
    io.client.host = &c.host
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
        leave_lock(c.lock, io)
        io.client.ports.completed(io.client.ports.ctx, io)
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


cdef void readable(completion *told, int32_t res) noexcept nogil:
    (<client_ports *>told.ctx).waiting &= ~<uint32_t>CLIENT_READS


cdef void writable(completion *told, int32_t res) noexcept nogil:
    (<client_ports *>told.ctx).waiting &= ~<uint32_t>CLIENT_WRITES


cdef bint poll(client_set *c, client_ports *client, uint32_t wish, uint32_t mask) noexcept nogil:
    """Let the loop's wait end when the descriptor is ready; False: there was no room to say so."""
    cdef io_uring_sqe *sqe = io_uring_get_sqe(c.ring)
    cdef completion *told = &client.readable if wish == CLIENT_READS else &client.writable
    if sqe == NULL:
        io_uring_submit(c.ring)
        return False
    io_uring_prep_poll_add(sqe, client.fd, mask)
    told.ctx = client
    told.done = readable if wish == CLIENT_READS else writable
    io_uring_sqe_set_data64(sqe, <uint64_t><uintptr_t>told)
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


cdef void welcome_nobody(client_set *c) noexcept nogil:
    """Take in who has joined, and leave what they have under way as it is."""
    cdef front_queue *queue = c.queue
    c.queue = NULL
    welcome(c)
    c.queue = queue


@no_gc_clear  # the queue's lists lead into the clients' memory
cdef class ClientSet:
    """Whoever is stepped together. `step` by one thread; the rest by one other."""

    def __init__(self, RangeLock lock not None):
        if self.members is not None:
            raise LocalProtocolError("a set of clients is made once")
        self.members = {}
        self.lock = lock
        self.c.lock = &lock.l
        self.c.host.ctx = &self.c
        self.c.host.submit = submit
        self.c.host.place = place_on
        self.c.host.displace = displace_from
        self.c.host.parts = parts_on
        pthread_mutex_init(&self.c.mutex, NULL)

    def __dealloc__(self):
        if self.members is not None:
            if self.c.queue != NULL:
                forget_operations(self.c.queue)
            pthread_mutex_destroy(&self.c.mutex)

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
            forget_operations(self.c.queue)
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


@no_gc_clear
cdef class Clients(ClientSet):
    """The clients of a queue, and the queue: run by a `Loop` in its place."""

    def __init__(self, RangeLock lock not None, FrontQueue queue not None):
        super().__init__(lock)
        self.queue = queue
        self.c.queue = &queue.q
        self.poller.ctx = &self.c
        self.poller.fd = -1
        self.poller.attach = attach
        self.table.ctx = &self.c
        self.table.step = step
        self.table.may_sleep = may_sleep
        self.table.events = queue.table.events
        self.table.engine = &self.poller
        self.table.outstanding = queue.table.outstanding

    @property
    def ports(self):
        """Capsule ``xvd.stepper_ports``, for a `Loop`."""
        return wrap(&self.table, "xvd.stepper_ports")
