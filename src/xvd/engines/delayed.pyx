# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""The delaying channel: each operation is held until it is due.

That is a fixed time later, for any number at once; or when those before it have had theirs, each of
which takes so long by itself and for its bytes; or the later of both. One fixed time for each kind
of operation makes one line for each, in which nothing overtakes; a timer of the system is set to
the head that is due first.
"""

from libc.errno cimport errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport strerror
from posix.time cimport itimerspec
from posix.unistd cimport close

from xvd.dataplane.abi cimport ENGINE_DISCARD, ENGINE_FLUSH
from xvd.dataplane.c cimport monotonic_ns
from xvd.dataplane.ports cimport engine_io, engine_of, engine_ports, wrap
cdef extern from "sys/timerfd.h" nogil:
    int timerfd_create(int clock, int flags)
    int timerfd_settime(int fd, int flags, const itimerspec *new, itimerspec *old)
    enum:
        TFD_CLOEXEC
        TFD_NONBLOCK
        TFD_TIMER_ABSTIME

cdef extern from "time.h" nogil:
    enum:
        CLOCK_MONOTONIC

cdef enum:
    KINDS = ENGINE_DISCARD + 1
    PLACES = 2048                # requests of the largest ring: a queue has no more in flight


cdef struct line:
    uint64_t delay_ns
    engine_io **ios              # PLACES of them, round and round
    uint64_t *due_ns
    uint32_t first, count

cdef struct delayed:
    engine_ports *lower
    int timer_fd
    uint64_t set_to_ns           # 0: the timer is not set
    uint64_t each_ns             # an operation takes so long, and the next waits for it
    double byte_ns
    uint64_t free_ns             # when those that have come are through
    line lines[KINDS]
    engine_io *batch[PLACES]


cdef void set_timer(delayed *d) noexcept nogil:
    """To the first that is due, if there is one and the timer does not go off before anyway."""
    cdef uint64_t first = 0, due
    cdef uint32_t kind
    cdef itimerspec at
    for kind in range(<uint32_t>KINDS):
        if d.lines[kind].count:
            due = d.lines[kind].due_ns[d.lines[kind].first]
            first = min(first, due) if first else due
    if first == 0 or (d.set_to_ns and d.set_to_ns <= first):
        return
    d.set_to_ns = first
    at.it_interval.tv_sec = at.it_interval.tv_nsec = 0
    at.it_value.tv_sec = first // 1000000000
    at.it_value.tv_nsec = first % 1000000000
    timerfd_settime(d.timer_fd, TFD_TIMER_ABSTIME, &at, NULL)


cdef uint64_t when_due(delayed *d, const line *l, const engine_io *io,
                       uint64_t now) noexcept nogil:
    cdef uint64_t due = now + l.delay_ns
    cdef uint64_t takes = d.each_ns + <uint64_t>(d.byte_ns * io.length)
    if takes == 0 or io.op == ENGINE_FLUSH:
        return due
    d.free_ns = max(d.free_ns, now) + takes
    return max(due, d.free_ns)


cdef void submit(void *ctx, engine_io **ios, uint32_t n) noexcept nogil:
    cdef delayed *d = <delayed *>ctx
    cdef uint64_t now = monotonic_ns(), due
    cdef uint32_t i, at
    cdef line *l
    for i in range(n):
        l = &d.lines[ios[i].op]
        due = when_due(d, l, ios[i], now)
        if due == now or l.count == PLACES:
            d.lower.submit(d.lower.ctx, &ios[i], 1)
            continue
        at = (l.first + l.count) % PLACES
        l.ios[at] = ios[i]
        l.due_ns[at] = due
        l.count += 1
    set_timer(d)


cdef void pass_on(delayed *d) noexcept nogil:
    """Hand on what is due."""
    cdef uint64_t now = monotonic_ns()
    cdef uint32_t kind, n
    cdef line *l
    if d.set_to_ns and d.set_to_ns <= now:
        d.set_to_ns = 0
    for kind in range(<uint32_t>KINDS):
        l = &d.lines[kind]
        n = 0
        while l.count and l.due_ns[l.first] <= now:
            d.batch[n] = l.ios[l.first]
            l.first = (l.first + 1) % PLACES
            l.count -= 1
            n += 1
        if n:
            d.lower.submit(d.lower.ctx, d.batch, n)
    set_timer(d)


cdef uint32_t reap(void *ctx, engine_io **out, uint32_t room) noexcept nogil:
    cdef delayed *d = <delayed *>ctx
    pass_on(d)
    return d.lower.reap(d.lower.ctx, out, room)


cdef void attach(void *ctx, void *io_uring) noexcept nogil:
    cdef delayed *d = <delayed *>ctx
    d.lower.attach(d.lower.ctx, io_uring)


def can_delay(channel):
    """Whether a channel may lie behind one of ours: it must not need a descriptor of its own."""
    return engine_of(channel).fd < 0


cdef class DelayedChannel:
    """`Channel` in front of another, for which `can_delay` holds.

    delays_s: seconds by kind of operation, 0 and more, in the order of ports.pxd: read, write,
    flush, discard. each_s, byte_s: how long an operation takes, and each of its bytes.
    """

    cdef delayed d
    cdef engine_ports table
    cdef object lower

    def __cinit__(self):
        self.d.timer_fd = -1

    def __init__(self, lower, delays_s, *, double each_s=0.0, double byte_s=0.0):
        cdef uint32_t kind
        if self.d.timer_fd >= 0:
            raise ValueError("a channel is made once")
        self.lower = lower
        self.d.lower = engine_of(lower)
        self.d.each_ns, self.d.byte_ns = <uint64_t>(each_s * 1e9), byte_s * 1e9
        for kind in range(<uint32_t>KINDS):
            self.d.lines[kind].delay_ns = <uint64_t>(delays_s[kind] * 1e9)
            self.d.lines[kind].ios = <engine_io **>calloc(PLACES, sizeof(void *))
            self.d.lines[kind].due_ns = <uint64_t *>calloc(PLACES, sizeof(uint64_t))
            if not self.d.lines[kind].ios or not self.d.lines[kind].due_ns:
                raise MemoryError("no memory for delayed operations")
        self.d.timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)
        if self.d.timer_fd < 0:
            raise OSError(errno, f"no timer is to be had: {strerror(errno).decode()}")
        self.table.ctx = &self.d
        self.table.fd = self.d.timer_fd
        self.table.submit = submit
        self.table.reap = reap
        self.table.attach = attach

    def __dealloc__(self):
        cdef uint32_t kind
        for kind in range(<uint32_t>KINDS):
            free(self.d.lines[kind].ios)
            free(self.d.lines[kind].due_ns)
        if self.d.timer_fd >= 0:
            close(self.d.timer_fd)

    @property
    def ports(self):
        """Capsule ``xvd.engine_ports``."""
        return wrap(&self.table, "xvd.engine_ports")

    def close(self):
        """Close the channel behind."""
        self.lower.close()
