# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""A channel to a vhost-user-blk server: one virtqueue (vring.pxd), in memory that both have.

An operation of more than a slot's bytes is several requests.

The server may die. It is our own child, and whoever watches it calls `halt`: what it had finished
is taken, what it had not stays in its slots, and goes to its successor, in the same order, after
`go`. What it had answered for and not written out is kept as well (unflushed.pxd).

The queue's thread and the one that watches exclude each other by a mutex, taken once for a batch.
"""

cimport cython
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EIO, ENOTCONN, EOPNOTSUPP
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset
from posix.uio cimport iovec
from posix.unistd cimport close, read, write

from xvd.dataplane.abi cimport ENGINE_DISCARD, ENGINE_FLUSH, ENGINE_READ, ENGINE_WRITE
from xvd.dataplane.c cimport (
    xvd_add64, xvd_cas64, xvd_fence, xvd_load16_acquire, xvd_load64, xvd_store16_release)
from xvd.dataplane.ports cimport ENGINE_UNMAP, ENGINE_ZEROES, engine_io, engine_ports, wrap
from xvd.engines.channel cimport (
    finish, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_unlock, reap_list)
from xvd.engines.unflushed cimport (
    KEPT_ZEROES, UNFLUSHED_BYTES, get_bytes, has_room, is_half_full, keep, record, size_in_log)
from xvd.engines.vring cimport (
    AREA, AVAILABLE_AT, BLK_DISCARD, BLK_FLUSH, BLK_IN, BLK_OUT, DATA_AT, DESC_NEXT, DESC_WRITE,
    DESCRIPTORS_AT, EACH, HEADERS_AT, LINE, NO_ROOM, RING, SLOT_BYTES, SLOT_STRIDE, SLOTS,
    STATUS_IN, STATUS_OK, STATUS_UNSUPPORTED, UNANSWERED, USED_AT, ZEROES_ASKED_FOR,
    ZEROES_WRITTEN, blk_header, copy, data_of, describe, describe_range, describe_zeroes,
    descriptor, kick, publish, slot, status_of, take_slot, unlink, used_entry, vhost, written)

import os

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long n, int timeout)
    enum:
        POLLIN

cdef void begin_flush(vhost *v, engine_io *io) noexcept nogil:
    cdef uint16_t number = take_slot(v, io, 0, 0)
    v.slots[number].covers = xvd_load64(&v.writes.answered)
    describe(v, number, BLK_FLUSH, 0, 0)
    publish(v, number)


cdef void flush_log(vhost *v) noexcept nogil:
    """Have written out what is kept, before there is no room for more."""
    if not v.flushing and v.nr_free:
        v.flushing = 1
        begin_flush(v, NULL)


cdef uint64_t part_of(const vhost *v, const engine_io *io) noexcept nogil:
    """How much of an operation one request takes."""
    return v.discard_bytes if io.op == ENGINE_DISCARD else <uint64_t>SLOT_BYTES


cdef bint has_data(const engine_io *io) noexcept nogil:
    """Whether it writes something, and not zeros that it says to be such."""
    return io.op == ENGINE_WRITE and not io.flags & ENGINE_ZEROES


cdef bint begin_part(vhost *v, engine_io *io) noexcept nogil:
    """Begin a part of the first that waits; False if there is no room for it."""
    cdef uint64_t length = min(io.length - v.begun, part_of(v, io)), reserved = 0
    cdef uint16_t number
    if v.nr_free == 0:
        return False
    if io.op != ENGINE_READ:
        reserved = size_in_log(length if has_data(io) else 0)
        if not has_room(&v.log, reserved):
            drop_flushed(v)
        if not has_room(&v.log, reserved):
            flush_log(v)
            return False
    number = take_slot(v, io, v.begun, length)
    v.slots[number].reserved = reserved
    v.log.reserved += reserved
    if io.op == ENGINE_DISCARD:
        describe_range(v, number, BLK_DISCARD, io.offset + v.begun, length, 0)
    elif io.op == ENGINE_WRITE and not has_data(io):
        describe_zeroes(v, number, ZEROES_ASKED_FOR if v.can_zero else ZEROES_WRITTEN)
    else:
        if io.op == ENGINE_WRITE:
            copy(v, io, v.begun, data_of(v, number), length, True)
        describe(v, number, BLK_OUT if io.op == ENGINE_WRITE else BLK_IN, io.offset + v.begun,
                 <uint32_t>length)
    publish(v, number)
    v.begun += length
    return True


cdef engine_io *take_waiting(vhost *v) noexcept nogil:
    """The first that waits, which has been begun to its end."""
    cdef engine_io *io = v.waiting
    v.begun = 0
    v.waiting = io.next
    return io


cdef void pump(vhost *v) noexcept nogil:
    """Begin what there is room for."""
    cdef engine_io *io
    while v.waiting != NULL:
        io = v.waiting
        if io.op == ENGINE_FLUSH and v.flush_failed:
            finish(&v.done, take_waiting(v), -EIO)
            continue
        if io.op == ENGINE_FLUSH:
            if v.nr_free == 0:
                break
            begin_flush(v, io)
        else:
            if not begin_part(v, io):
                break
            if v.begun < io.length:
                continue
        take_waiting(v)
    if is_half_full(&v.log):
        flush_log(v)
    kick(v)


cdef void submit(void *ctx, engine_io **ios, uint32_t n) noexcept nogil:
    cdef vhost *v = <vhost *>ctx
    cdef engine_io *io
    cdef uint64_t each
    cdef uint32_t i
    pthread_mutex_lock(&v.mutex)
    for i in range(n):
        io = ios[i]
        io.result = 0
        io.next = NULL
        each = part_of(v, io)
        # How many parts have not ended: the engine's own field while it has the operation.
        io.told.ctx = <void *><size_t>(
            1 if io.op == ENGINE_FLUSH else (io.length + each - 1) // each)
        if io.op != ENGINE_FLUSH and io.length == 0:
            finish(&v.done, io, 0)
            continue
        if v.waiting == NULL:
            v.waiting = io
        else:
            v.waiting_last.next = io
        v.waiting_last = io
    pump(v)
    pthread_mutex_unlock(&v.mutex)


# ---- From the server ---------------------------------------------------------------------------

cdef int32_t result_of(uint8_t status) noexcept nogil:
    if status == STATUS_OK:
        return 0
    return -EOPNOTSUPP if status == STATUS_UNSUPPORTED else -EIO


cdef void has_flushed(written *writes, uint64_t covered) noexcept nogil:
    cdef uint64_t before = xvd_load64(&writes.flushed)
    while before < covered and not xvd_cas64(&writes.flushed, before, covered):
        before = xvd_load64(&writes.flushed)


cdef void drop_flushed(vhost *v) noexcept nogil:
    """Keep no longer what has been flushed, by whichever channel."""
    cdef record what
    cdef uint64_t flushed = xvd_load64(&v.writes.flushed)
    while v.log.tail < v.log.head:
        get_bytes(&v.log, v.log.tail, &what, sizeof(record))
        if what.order >= flushed:
            return
        v.log.tail += size_in_log(what.length if what.op == ENGINE_WRITE else 0)


cdef void remember(vhost *v, uint16_t number) noexcept nogil:
    """Keep what was written or discarded, until it is flushed."""
    cdef slot *s = &v.slots[number]
    cdef record what
    what.order = xvd_add64(&v.writes.answered, 1)
    what.offset = s.io.offset + s.at
    what.length = s.length
    what.op = KEPT_ZEROES if s.zeroed else s.io.op
    keep(&v.log, &what, data_of(v, number) if what.op == ENGINE_WRITE else NULL)


cdef void part_ended(vhost *v, uint16_t number, int32_t result) noexcept nogil:
    cdef slot *s = &v.slots[number]
    cdef engine_io *io = s.io
    cdef size_t left = <size_t>io.told.ctx - 1
    v.log.reserved -= s.reserved
    if result == 0 and io.op == ENGINE_READ:
        copy(v, io, s.at, data_of(v, number), s.length, False)
    elif result == 0 and io.op != ENGINE_FLUSH:
        remember(v, number)
    if result and io.result == 0:
        io.result = result
    io.told.ctx = <void *>left
    if left == 0:
        finish(&v.done, io, io.result)


cdef void ended(vhost *v, uint16_t number) noexcept nogil:
    """The server has answered a slot's request."""
    cdef slot *s = &v.slots[number]
    cdef int32_t result = result_of(status_of(v, number)[0])
    if result and s.zeroed == ZEROES_ASKED_FOR:  # it may not be able to; it can write
        v.can_zero = v.can_zero and result != -EOPNOTSUPP
        describe_zeroes(v, number, ZEROES_WRITTEN)
        publish(v, number)
        return
    if s.covers and result == 0:
        has_flushed(v.writes, s.covers)
        drop_flushed(v)
    if s.io == NULL:
        v.flushing = 0
        if result:               # what is lost is lost: nobody can be told but by the next flush
            v.flush_failed = 1
            v.log.tail = v.log.head
    else:
        part_ended(v, number, result)
    unlink(v, number)


cdef bint ask_for_event(vhost *v) noexcept nogil:
    """At the next answer (virtio 1.2, 2.7.9); False if there is one already."""
    v.available[2 + RING] = v.cons
    xvd_fence()
    return v.cons == xvd_load16_acquire(&v.used[1])


cdef uint32_t collect(vhost *v) noexcept nogil:
    """Take what has been answered, and hear of the next answer, unless who takes it asks for that.
    How many."""
    cdef uint32_t taken = 0, id
    while True:
        while v.cons != xvd_load16_acquire(&v.used[1]):
            id = v.used_entries[v.cons % RING].id
            v.cons += 1
            taken += 1
            if id % EACH == 0 and id < SLOTS * EACH and v.slots[id // EACH].busy:
                ended(v, id // EACH)
        if v.asked or ask_for_event(v):
            return taken


cdef uint32_t reap(void *ctx, engine_io **out, uint32_t room) noexcept nogil:
    cdef vhost *v = <vhost *>ctx
    cdef uint32_t n
    if v.done.first == NULL and v.cons == xvd_load16_acquire(&v.used[1]):
        return 0
    pthread_mutex_lock(&v.mutex)
    if collect(v):
        pump(v)
    n = reap_list(&v.done, out, room)
    pthread_mutex_unlock(&v.mutex)
    return n


cdef int peek(void *ctx) noexcept nogil:
    cdef vhost *v = <vhost *>ctx
    return xvd_load64(&v.done.first) != 0 or v.cons != xvd_load16_acquire(&v.used[1])


cdef int may_sleep(void *ctx) noexcept nogil:
    cdef vhost *v = <vhost *>ctx
    cdef bint nothing
    pthread_mutex_lock(&v.mutex)
    v.asked = 1
    nothing = ask_for_event(v) and v.done.first == NULL
    pthread_mutex_unlock(&v.mutex)
    return nothing


cdef void attach(void *ctx, void *io_uring) noexcept nogil:
    cdef vhost *v = <vhost *>ctx
    pthread_mutex_lock(&v.mutex)
    v.asked = 0
    ask_for_event(v)
    pthread_mutex_unlock(&v.mutex)


cdef bint wait_for_answer(vhost *v, int dead_fd) noexcept nogil:
    """Wait until something is answered; False if the server is dead."""
    cdef pollfd fds[2]
    cdef uint64_t count
    memset(fds, 0, sizeof(fds))
    fds[0].fd, fds[1].fd = v.call_fd, dead_fd
    fds[0].events = fds[1].events = POLLIN
    poll(fds, 2, -1)
    if fds[0].revents:
        read(v.call_fd, &count, 8)
        return True
    return not fds[1].revents


# ---- A server that dies ------------------------------------------------------------------------

cdef void begin_ring(vhost *v) noexcept nogil:
    """As at the beginning; what is in flight is to be done by another server."""
    cdef uint16_t number = v.first
    memset(v.area + AVAILABLE_AT, 0, HEADERS_AT - AVAILABLE_AT)
    v.prod = v.kicked = v.cons = 0
    while number != NO_ROOM:
        status_of(v, number)[0] = UNANSWERED
        publish(v, number)
        number = v.slots[number].after


cdef class Writes:
    """Counts what was written to one storage through all channels, and what of it is flushed."""

    cdef written counts


@cython.no_gc_clear              # the area's buffer is released, not dropped
cdef class VhostChannel:
    """`Channel` to a vhost-user-blk server.

    memory: what the server has too; the channel's `AREA_BYTES` of it begin at `offset`, and
    for the server at `address`. It is no memoryview: those are cleared under their
    users when garbage is collected. discard_bytes, zeroes_bytes: most that the server
    discards at once, and lets be zeros without data. It begins halted.
    """

    cdef vhost v
    cdef engine_ports table
    cdef engine_io own_io        # of `perform`
    cdef iovec own_iov
    cdef Writes writes
    cdef Py_buffer buffer
    cdef bint has_buffer

    def __cinit__(self, *args, **kwargs):
        pthread_mutex_init(&self.v.mutex, NULL)
        self.v.kick_fd = self.v.call_fd = -1

    def __init__(self, memory, uint64_t offset, uint64_t address, Writes writes, *,
                 uint64_t discard_bytes, uint64_t zeroes_bytes):
        cdef vhost *v = &self.v
        cdef uint16_t i
        PyObject_GetBuffer(memory, &self.buffer, PyBUF_WRITABLE)
        self.has_buffer = True
        if offset + AREA > <uint64_t>self.buffer.len:
            raise ValueError(f"an area has {AREA} bytes")
        v.log.bytes = <uint8_t *>malloc(UNFLUSHED_BYTES)
        if v.log.bytes == NULL:
            raise MemoryError("no memory for what is not flushed yet")
        self.writes = writes
        v.writes = &writes.counts
        v.area = <uint8_t *>self.buffer.buf + offset
        v.descriptors = <descriptor *>(v.area + DESCRIPTORS_AT)
        v.available = <uint16_t *>(v.area + AVAILABLE_AT)
        v.used = <uint16_t *>(v.area + USED_AT)
        v.used_entries = <used_entry *>(v.area + USED_AT + 4)
        v.kick_from = <uint16_t *>(v.area + USED_AT + 4 + 8 * RING)
        v.discard_bytes = max(discard_bytes, <uint64_t>512)
        v.can_zero = zeroes_bytes >= SLOT_BYTES
        v.first = v.last = NO_ROOM
        for i in range(<uint16_t>SLOTS):
            self.lay_out(i, address)
            v.free_slots[i] = SLOTS - 1 - i
        v.nr_free = SLOTS
        begin_ring(v)
        v.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        v.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.table.ctx = v
        self.table.fd = v.call_fd
        self.table.submit = submit
        self.table.reap = reap
        self.table.attach = attach
        self.table.peek = peek
        self.table.may_sleep = may_sleep

    cdef lay_out(self, uint16_t number, uint64_t address):
        """Write what never changes of a slot's descriptors."""
        cdef descriptor *d = self.v.descriptors + number * EACH
        d[0].addr = address + HEADERS_AT + LINE * number
        d[0].len = sizeof(blk_header)
        d[0].flags = DESC_NEXT
        d[1].addr = address + DATA_AT + <uint64_t>number * SLOT_STRIDE
        d[1].next = number * EACH + 2
        d[2].addr = d[0].addr + STATUS_IN
        d[2].len = 1
        d[2].flags = DESC_WRITE

    def __dealloc__(self):
        if self.has_buffer:
            PyBuffer_Release(&self.buffer)
        free(self.v.log.bytes)
        for fd in (self.v.kick_fd, self.v.call_fd):
            if fd >= 0:
                close(fd)
        pthread_mutex_destroy(&self.v.mutex)

    @property
    def ports(self):
        """Capsule ``xvd.engine_ports``."""
        return wrap(&self.table, "xvd.engine_ports")

    @property
    def kick_fd(self):
        """The eventfd by which the server hears of requests."""
        return self.v.kick_fd

    @property
    def call_fd(self):
        """The eventfd by which the server tells of answers."""
        return self.v.call_fd

    def perform(self, uint8_t op, uint64_t offset, data, int dead_fd=-1, *, bint unmap=False):
        """Do one operation of a channel that no queue has, and wait for it; 0, or a positive errno.

        data: the memory of a read or a write, in one piece, or how many bytes a discard has, or a
        write of zeros. unmap: whether those need no space.
        dead_fd: a pidfd of the server; ENOTCONN if it dies before, and the channel is of no more
        use.
        """
        cdef const uint8_t[::1] memory
        cdef engine_io *io = &self.own_io
        cdef engine_io *done = NULL
        io.op, io.offset, io.length, io.iovcnt, io.flags = op, offset, 0, 0, 0
        if isinstance(data, int):
            io.length = data
            if op == ENGINE_WRITE:
                io.flags = ENGINE_ZEROES | (ENGINE_UNMAP if unmap else 0)
        elif len(data):
            memory = data
            self.own_iov.iov_base, self.own_iov.iov_len = <void *>&memory[0], memory.shape[0]
            io.iov, io.iovcnt, io.length = &self.own_iov, 1, memory.shape[0]
        cdef bint alive = True
        with nogil:
            attach(&self.v, NULL)        # a queue may have had it, which asked
            submit(&self.v, &io, 1)
            while alive and reap(&self.v, &done, 1) == 0:
                alive = wait_for_answer(&self.v, dead_fd)
        return -io.result if done != NULL else ENOTCONN

    def halt(self):
        """The server is dead: take what it has answered, and begin nothing. Any thread."""
        cdef uint64_t one = 1
        with nogil:
            pthread_mutex_lock(&self.v.mutex)
            self.v.live = 0
            collect(&self.v)
            begin_ring(&self.v)
            pthread_mutex_unlock(&self.v.mutex)
            write(self.v.call_fd, &one, 8)

    def go(self):
        """There is a server, which has this ring from its beginning. Any thread."""
        cdef uint64_t one = 1
        with nogil:
            pthread_mutex_lock(&self.v.mutex)
            self.v.live = 1
            pump(&self.v)
            write(self.v.kick_fd, &one, 8)
            pthread_mutex_unlock(&self.v.mutex)

    def unflushed(self):
        """Return what was written and may not be on the storage: (order, operation, offset, length,
        data), oldest first; data is empty for a discard. Only while it is halted."""
        cdef record what
        cdef uint64_t at
        cdef bytes data
        found = []
        pthread_mutex_lock(&self.v.mutex)
        drop_flushed(&self.v)
        at = self.v.log.tail
        while at < self.v.log.head:
            get_bytes(&self.v.log, at, &what, sizeof(record))
            at += sizeof(record)
            data = b""
            if what.op == KEPT_ZEROES:
                what.op, data = ENGINE_WRITE, bytes(what.length)
            elif what.op == ENGINE_WRITE:
                data = bytes(what.length)
                get_bytes(&self.v.log, at, <char *>data, what.length)
                at += what.length
            found.append((what.order, what.op, what.offset, what.length, data))
        pthread_mutex_unlock(&self.v.mutex)
        return found

    def forget_unflushed(self):
        """All of that is on the storage now."""
        pthread_mutex_lock(&self.v.mutex)
        self.v.log.tail = self.v.log.head
        pthread_mutex_unlock(&self.v.mutex)

    def close(self):
        """Nothing runs here."""


AREA_BYTES = <uint64_t>AREA
RING_ENTRIES = <uint32_t>RING
LAYOUT = (<uint64_t>DESCRIPTORS_AT, <uint64_t>AVAILABLE_AT, <uint64_t>USED_AT)
