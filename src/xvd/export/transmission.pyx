# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""One NBD client after its negotiation: requests off its socket, plain ones to the queue in whose
thread this is stepped, replies back; no Python object and no allocation for a request.

Each request has a slot, from its header (transmission_in.pxd) to the last byte of its reply
(transmission_out.pxd). Reads, writes and flushes of whole sectors are offered to the queue.
Whatever else there is, and whatever the queue refuses or fails, is asked of Python
(transmission_ask.pxd), whose answer stands in line with the other replies.

A request that was begun is finished, even if its client has gone.
"""

from cython cimport no_gc_clear
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy
from posix.unistd cimport close

from xvd.dataplane.abi cimport CLIENT_READS, CLIENT_WRITES, STEP_DRAINED, STEP_WORKED
from xvd.dataplane.c cimport (
    monotonic_ns, xvd_cas32, xvd_exchange32, xvd_load_acquire, xvd_store_release)
from xvd.dataplane.ports cimport client_host, wrap
from xvd.export.transmission_ask cimport end_input, take_answers, tell
from xvd.export.transmission_in cimport receive, relaunch
from xvd.export.transmission_out cimport finish, send
from xvd.export.transmission_slots cimport drop_buffer, drop_idle, ensure_buffer, rounded, unplace

import os


cdef uint32_t step(void *ctx, const client_host *host) noexcept nogil:
    """Replies first: the client works while we take what it has sent."""
    cdef transmission *t = <transmission *>ctx
    cdef bint moved = take_answers(t)
    cdef uint32_t wanted = xvd_load_acquire(&t.wanted)
    if wanted != WANTED_MORE:
        end_input(t, NEWS_GONE if wanted == WANTED_GONE else NEWS_OVER)
    if t.ready.first != NULL and not t.ports.waiting & CLIENT_WRITES:
        moved |= send(t)
    if t.progress < PROGRESS_OVER and not t.ports.waiting & CLIENT_READS:
        moved |= receive(t, host)
    if not moved and t.idle and xvd_load_acquire(&t.memory.starved):
        drop_idle(t)
    if t.progress >= PROGRESS_OVER and t.in_use == 0:
        end_input(t, NEWS_GONE)  # which ends the polls that still run
        return STEP_DRAINED
    return STEP_WORKED if moved else 0


cdef uint32_t wishes(void *ctx) noexcept nogil:
    cdef const transmission *t = <const transmission *>ctx
    cdef uint32_t wanted = 0
    if t.progress < PROGRESS_BLOCKED:
        wanted |= CLIENT_READS
    if t.ready.first != NULL:
        wanted |= CLIENT_WRITES
    return wanted


cdef void completed(void *ctx, front_io *io) noexcept nogil:
    finish(<transmission *>ctx, <slot *>io)


cdef void resume(void *ctx, const client_host *host) noexcept nogil:
    """In the order of arrival: by the number that is next above the last one."""
    cdef transmission *t = <transmission *>ctx
    cdef slot *following
    cdef uint64_t last = 0
    cdef uint32_t i
    while True:
        following = NULL
        for i in range(t.requests_max):
            if t.slots[i].state == SLOT_ON_QUEUE and t.slots[i].number > last:
                if following == NULL or t.slots[i].number < following.number:
                    following = &t.slots[i]
        if following == NULL:
            return
        last = following.number
        relaunch(t, following, host)


cdef void displaced(void *ctx) noexcept nogil:
    """Keep what has come of payloads, and what is to be sent of replies."""
    cdef transmission *t = <transmission *>ctx
    cdef slot *s
    cdef uint32_t i
    for i in range(t.requests_max):
        s = &t.slots[i]
        if s.state == SLOT_FILLING:
            unplace(s, t.filled)
        elif s.state == SLOT_READY:
            unplace(s, s.body_size)
        else:
            unplace(s, s.length if s.command == COMMAND_WRITE else 0)


cdef void close_descriptors(transmission *t) noexcept nogil:
    if t.fd > 0:
        close(t.fd)
    if t.bell > 0:
        close(t.bell)
    t.fd = t.bell = -1


cdef void left(void *ctx) noexcept nogil:
    tell(<transmission *>ctx, NEWS_LEFT)


@no_gc_clear
cdef class Transmission:
    """The requests of one client; whoever has its ``ports`` steps it.

    fd: its socket, which is ours from now on, also if this raises. structured: it has negotiated
    structured replies. requests_max, bytes_max: what it may have in progress, and how many bytes of
    data. payload_max: bytes of its longest read or write. memory: what it shares with the export's
    other clients. received: what came after its negotiation.

    The methods are for one thread, another than the one that steps it.
    """

    OVER = NEWS_OVER
    MALFORMED = NEWS_MALFORMED
    GONE = NEWS_GONE
    EOF = NEWS_EOF
    LEFT = NEWS_LEFT

    def __cinit__(self, int fd, *, bint structured, uint32_t requests_max, uint64_t bytes_max,
                  uint32_t payload_max, ExportMemory memory not None,
                  const uint8_t[::1] received=b""):
        cdef uint32_t i
        self.t.fd = fd
        self.t.bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        pthread_mutex_init(&self.t.mutex, NULL)
        self.memory = memory
        self.t.memory = &memory.m
        self.t.active_ns = monotonic_ns()
        self.t.structured = structured
        self.t.requests_max = requests_max
        self.t.bytes_max = bytes_max
        self.t.payload_max = payload_max
        self.t.input = <uint8_t *>malloc(INPUT_SIZE)
        self.t.slots = <slot *>calloc(requests_max, sizeof(slot))
        if self.t.input == NULL or self.t.slots == NULL:
            raise MemoryError("no memory for an NBD client")
        if received.shape[0] > INPUT_SIZE:
            raise ValueError(f"{received.shape[0]} bytes came too early")
        if received.shape[0]:
            memcpy(self.t.input, &received[0], received.shape[0])
        self.t.end = received.shape[0]
        for i in range(requests_max):
            self.t.slots[i].next = self.t.free
            self.t.free = &self.t.slots[i]
        self.t.ports.ctx = &self.t
        self.t.ports.fd = fd
        self.t.ports.step = step
        self.t.ports.wishes = wishes
        self.t.ports.completed = completed
        self.t.ports.resume = resume
        self.t.ports.displaced = displaced
        self.t.ports.left = left

    def __dealloc__(self):
        cdef uint32_t i
        close_descriptors(&self.t)
        if self.t.slots != NULL:
            for i in range(self.t.requests_max):
                drop_buffer(&self.t, &self.t.slots[i])
        pthread_mutex_destroy(&self.t.mutex)
        free(self.t.slots)
        free(self.t.input)

    def close(self):
        """Give the descriptors back: after LEFT. Idempotent."""
        close_descriptors(&self.t)

    @property
    def ports(self):
        """Capsule ``xvd.client_ports``."""
        return wrap(&self.t.ports, "xvd.client_ports")

    @property
    def bell(self):
        """Readable when `take` has something; to be read (8 bytes) before it is called."""
        return self.t.bell

    def take(self):
        """Take what has happened, as (flags: OVER and the others, requests).

        A request is (slot, errno, flags, command, cookie, offset, length, payload): errno is what
        the disk has failed with, or 0 if nothing was tried; payload is of a write that was not.
        Each has one answer.
        """
        cdef slot *s
        cdef uint32_t news
        pthread_mutex_lock(&self.t.mutex)
        s = self.t.asked.first
        self.t.asked.first = self.t.asked.last = NULL
        news = self.t.tidings
        self.t.tidings = 0
        pthread_mutex_unlock(&self.t.mutex)
        requests = []
        while s != NULL:
            requests.append(self.described(s))
            s = s.next
        return news, requests

    cdef described(self, slot *s):
        """A request in Python's terms. Its payload is copied: the disk may read it for longer than
        somebody waits for the answer."""
        payload = None
        if s.command == COMMAND_WRITE and s.error == 0 and s.charge:
            payload = PyBytes_FromStringAndSize(<char *>s.buffer, s.length)
        return (s - self.t.slots, -s.error, s.flags, s.command, _big_endian(s.cookie), s.offset,
                s.length, payload)

    def answer(self, uint32_t number, *parts):
        """The whole reply to the request in this slot, given in parts; True if the stepping thread
        must be woken for it.

        Raises MemoryError, and then has done nothing.
        """
        cdef slot *s = &self.t.slots[number]
        cdef bint first
        if number >= self.t.requests_max or s.state != SLOT_ASKED:
            raise ValueError(f"nothing was asked by slot {number}")
        self.put_reply(s, parts)
        s.state = SLOT_ANSWERED
        pthread_mutex_lock(&self.t.mutex)
        first = self.t.answered.first == NULL
        put(&self.t.answered, s)
        xvd_store_release(&self.t.answers, 1)
        pthread_mutex_unlock(&self.t.mutex)
        return first

    cdef put_reply(self, slot *s, tuple parts):
        """The first part is the head; the rest goes into the buffer, and the head too if long."""
        cdef const uint8_t[::1] part
        cdef size_t at = 0, size = sum([len(p) for p in parts])
        cdef size_t head = len(parts[0])
        if head > HEAD_MAX:
            head = 0
        if size - head > s.capacity and not ensure_buffer(&self.t, s, rounded(size - head)):
            raise MemoryError("no memory for a reply")
        for number, one in enumerate(parts):
            part = one
            if number == 0 and head:
                memcpy(s.head, &part[0], head)
            elif part.shape[0]:
                memcpy(s.buffer + at, &part[0], part.shape[0])
                at += part.shape[0]
        s.head_size = head
        s.body_size = at

    def finish(self):
        """Take no more requests; the stepping thread is to be woken."""
        xvd_cas32(&self.t.wanted, WANTED_MORE, WANTED_OVER)

    def cut(self):
        """Send no more replies; the stepping thread is to be woken."""
        xvd_exchange32(&self.t.wanted, WANTED_GONE)

    @property
    def in_progress(self):
        """Requests that are not answered yet."""
        return self.t.in_progress

    @property
    def is_busy(self):
        """Whether anything is between a request's header and the last byte of its reply."""
        return self.t.in_use > 0

    @property
    def held(self):
        """Bytes of their data, and of replies that the client has not read."""
        return self.t.held

    @property
    def idle_s(self):
        """Seconds since bytes came from the client, or went to it."""
        return (monotonic_ns() - self.t.active_ns) / 1e9

    @property
    def awaits_client(self):
        """Whether data is held for nothing but what the client has to send or to read."""
        return self.t.held > 0 and self.t.in_progress == (self.t.filling != NULL)

    def counters(self):
        """requests, and bytes_read and bytes_written of those that a queue carried out."""
        return dict(self.t.count)


cdef _big_endian(uint64_t as_it_came):
    return int.from_bytes((<uint8_t *>&as_it_came)[:8], "big")
