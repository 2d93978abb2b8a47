# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""One native thread's loop over one queue's step, and the one place where it sleeps.

The thread blocks in a single io_uring wait that covers the event channel, the storage's completions
and a control wake-up. Before it blocks it asks the peer for an event and looks at the ring once
more (`may_sleep`), and so with storage that completes behind its back. A watchdog ends each sleep
after some seconds: a lost event costs a delay, not the disk. While it finds nothing the next one
comes twice as late, up to `WATCHDOGS_MOST` times: of hundreds of idle disks each wakes up once a
minute. A frontend that waits for nothing can lose no event, and sleeps until it is woken.

An event is acknowledged when the thread is about to sleep, and the ring is looked at after that. A
peer that sends events with nothing behind them is heard less and less often: its next event is let
in only after a pause that doubles each time, from a millisecond to a second (XSA-332, XSA-391;
Linux's late EOI). One with something behind them never waits: work of any kind ends the row.

Before it sleeps a thread may look again and again for a while, which saves both ends an event:
waiting.pyx says for how long. Or it sleeps for a set time first without asking for an event, and
takes all that has come meanwhile at once (hold-off: blkif.h's `req_event` and `rsp_event` stay
where they are).
"""

from libc.errno cimport EINTR, ENOENT, ETIME
from libc.stdint cimport int32_t, uint8_t, uint64_t
from posix.unistd cimport close, read, write

from xvd.dataplane.abi cimport STEP_BROKEN, STEP_DRAINED, STEP_EXCHANGED, STEP_LEFT, STEP_WORKED
from xvd.dataplane.c cimport monotonic_ns, xvd_exchange32, xvd_pause, xvd_store_release
from xvd.dataplane.liburing cimport (
    IORING_CQE_F_MORE, IORING_SETUP_CLAMP, __kernel_timespec, io_uring_cq_ready, io_uring_cqe,
    io_uring_cqe_seen, io_uring_get_sqe, io_uring_peek_cqe, io_uring_prep_cancel64,
    io_uring_prep_poll_multishot,
    io_uring_queue_exit, io_uring_queue_init, io_uring_sq_ready, io_uring_sqe,
    io_uring_sqe_set_data64, io_uring_submit, io_uring_submit_and_wait_timeout)
from xvd.dataplane.loop.waiting cimport begin_waiting, has_work, look_on, thread_cpu_ns, wakes
from xvd.dataplane.ports cimport completion, engine_ports, stepper_of

import errno
import os

from xvd.errors import LocalProtocolError

cdef extern from "sys/eventfd.h" nogil:
    int eventfd(unsigned initval, int flags)
    enum:
        EFD_CLOEXEC
        EFD_NONBLOCK

cdef extern from "sched.h" nogil:
    int sched_yield()

cdef extern from "poll.h" nogil:
    enum:
        POLLIN

cdef enum:
    RING_ENTRIES = 256
    IDLE_EVENTS_FREE = 1         # in a row, before they are let in later and later
    PAUSE_NS = 1000000
    PAUSE_DOUBLINGS = 10
    YIELD_NS = 2000              # a system call each time would be most of what looking costs
    SLEEPS_EACH = 16             # of which one is measured
    WATCHDOGS_MOST = 6           # times the first one
    SPINS = 32                   # looks at the ring from one step to the next

cdef long long NOTHING_TO_MISS_NS = 3600 * <long long>1000000000


cdef int fd_of(loop_state *s, uint32_t tag) noexcept nogil:
    if tag == TAG_EVENT:
        return s.stepper.events.fd
    if tag == TAG_CONTROL:
        return s.control_fd
    return s.stepper.engine.fd if s.stepper.engine != NULL else -1


cdef void arm(loop_state *s) noexcept nogil:
    """Ask for every descriptor whose poll is not, or no longer, running."""
    cdef uint32_t tag
    cdef io_uring_sqe *sqe
    for tag in range(TAG_EVENT, TAG_ENGINE + 1):
        if not s.unarmed & (1 << tag):
            continue
        if fd_of(s, tag) < 0:
            s.unarmed &= ~(<uint32_t>1 << tag)
            continue
        sqe = io_uring_get_sqe(&s.ring)
        if sqe == NULL:
            return
        io_uring_prep_poll_multishot(sqe, fd_of(s, tag), POLLIN)
        io_uring_sqe_set_data64(sqe, tag)
        s.unarmed &= ~(<uint32_t>1 << tag)


cdef void drain_fd(int fd) noexcept nogil:
    cdef uint64_t count
    read(fd, &count, 8)


cdef void change_stepper(loop_state *s) noexcept nogil:
    """At a control wake-up only: a step that is never replaced does not pay for it."""
    if not xvd_exchange32(&s.replaced, 0):
        return
    s.stepper = s.following
    if s.stepper.engine != NULL:
        s.stepper.engine.attach(s.stepper.engine.ctx, &s.ring)


cdef void change_storage(loop_state *s) noexcept nogil:
    """Attach what the stepper has now, and hear of nothing else."""
    cdef io_uring_sqe *sqe = io_uring_get_sqe(&s.ring)
    if sqe == NULL:
        io_uring_submit(&s.ring)
        sqe = io_uring_get_sqe(&s.ring)
    io_uring_prep_cancel64(sqe, TAG_ENGINE, 0)
    io_uring_sqe_set_data64(sqe, TAG_EXCHANGED)
    s.stepper.engine.attach(s.stepper.engine.ctx, &s.ring)


cdef void leave_channel(loop_state *s) noexcept nogil:
    """Hear of no event any more, and have nothing under way that would take one from others."""
    cdef io_uring_sqe *sqe
    io_uring_submit(&s.ring)     # an acknowledgement may wait there
    sqe = io_uring_get_sqe(&s.ring)
    io_uring_prep_cancel64(sqe, TAG_EVENT, 0)
    io_uring_sqe_set_data64(sqe, TAG_LEFT)
    io_uring_submit(&s.ring)
    s.event = 0


cdef void dispatch(loop_state *s, io_uring_cqe *cqe) noexcept nogil:
    cdef uint64_t tag = cqe.user_data
    cdef completion *told = <completion *>tag
    if tag > TAG_LAST:
        told.done(told, cqe.res)
        return
    if tag == TAG_LEFT:
        return
    if tag == TAG_EXCHANGED:
        if cqe.res == -ENOENT:   # there was no poll whose end would have it armed again
            s.unarmed |= <uint32_t>1 << TAG_ENGINE
        return
    if not cqe.flags & IORING_CQE_F_MORE:
        s.unarmed |= <uint32_t>1 << tag
    if tag == TAG_EVENT:
        s.event = fd_of(s, TAG_EVENT) >= 0
    elif tag > 0 and cqe.res > 0:
        drain_fd(fd_of(s, <uint32_t>tag))
        if tag == TAG_CONTROL:
            change_stepper(s)


cdef uint32_t reap(loop_state *s) noexcept nogil:
    cdef io_uring_cqe *cqe
    cdef uint32_t n = 0
    while io_uring_peek_cqe(&s.ring, &cqe) == 0:
        dispatch(s, cqe)
        io_uring_cqe_seen(&s.ring, cqe)
        n += 1
    return n


cdef void judge_event(loop_state *s) noexcept nogil:
    """Decide when the event that has come is acknowledged: now, if it was worth its while."""
    cdef uint32_t doublings
    if s.worked:
        s.idle_events = 0
    else:
        s.spurious += 1
        s.idle_events += 1
    s.event_due_ns = monotonic_ns()
    if s.idle_events > IDLE_EVENTS_FREE:
        doublings = min(s.idle_events - IDLE_EVENTS_FREE - 1, <uint32_t>PAUSE_DOUBLINGS)
        s.event_due_ns += <uint64_t>PAUSE_NS << doublings


cdef void acknowledge(loop_state *s) noexcept nogil:
    """Let further events in if it is time to, and if there is room to say so."""
    if not s.event:
        return
    if s.event_due_ns == 0:
        judge_event(s)
    if s.idle_events > IDLE_EVENTS_FREE and monotonic_ns() < s.event_due_ns:
        return
    if s.stepper.events.acknowledge(s.stepper.events.ctx, &s.ring):
        s.event = s.worked = 0
        s.event_due_ns = 0


cdef int sleep_for(loop_state *s, long long ns) noexcept nogil:
    """Submit what is prepared and wait; 0 or -errno, -ETIME if nothing came."""
    cdef __kernel_timespec ts
    cdef io_uring_cqe *cqe = NULL
    ts.tv_sec = ns // 1000000000
    ts.tv_nsec = ns % 1000000000
    s.sleeps += 1
    return io_uring_submit_and_wait_timeout(&s.ring, &cqe, 1, &ts, NULL)


cdef int sleep(loop_state *s) noexcept nogil:
    """Wait for as long as nothing is due; 0 or -errno for what is not a time-out or a signal."""
    cdef int rc
    cdef long long longest, ns = s.nap_ns
    if s.stepper.outstanding != NULL and s.stepper.outstanding[0] == 0:
        ns = NOTHING_TO_MISS_NS
    longest = ns
    if s.event:
        ns = min(ns, max(<long long>(s.event_due_ns - monotonic_ns()), <long long>0))
    if s.stepper.due_ns != NULL and s.stepper.due_ns[0]:
        ns = min(ns, max(<long long>(s.stepper.due_ns[0] - monotonic_ns()), <long long>0))
    rc = sleep_for(s, ns)
    if rc == -ETIME and ns < longest:
        return 0                 # something is due, and nothing was missed
    if rc == -ETIME:
        s.watchdogs += 1
        s.nap_ns = min(2 * s.nap_ns, WATCHDOGS_MOST * s.watchdog_ns)
        return 0
    s.wakeups += 1
    return rc if rc < 0 and rc != -EINTR else 0


cdef bint storage_has_news(loop_state *s) noexcept nogil:
    cdef engine_ports *engine = s.stepper.engine
    return engine != NULL and engine.peek != NULL and engine.peek(engine.ctx)


cdef bint storage_may_sleep(loop_state *s) noexcept nogil:
    """Whether nothing is completed, and what will be is told."""
    cdef engine_ports *engine = s.stepper.engine
    return engine == NULL or engine.may_sleep == NULL or engine.may_sleep(engine.ctx)


cdef int hold_off(loop_state *s) noexcept nogil:
    """Sleep without asking for an event; 0 or -errno."""
    cdef int rc = 0
    s.fresh = 0
    if storage_may_sleep(s):
        rc = sleep_for(s, s.holdoff_ns)
    reap(s)
    return 0 if rc == -ETIME or rc == -EINTR or rc > 0 else rc


cdef void spin(loop_state *s) noexcept nogil:
    """Wait for a moment, for the ring or the storage, without a step and a clock for each look."""
    cdef uint32_t i
    if s.stepper.peek == NULL:
        return
    for i in range(SPINS):
        if (s.stepper.peek(s.stepper.ctx) or storage_has_news(s)
                or io_uring_cq_ready(&s.ring)):
            return
        xvd_pause()


cdef bint poll_on(loop_state *s) noexcept nogil:
    """Wait for a moment instead of sleeping, if that pays; whoever else is ready to run in this
    kernel gets the CPU offered."""
    cdef uint64_t now
    if s.wait.longest_ns == 0:
        return False
    now = monotonic_ns()
    if not look_on(&s.wait, now):
        return False
    if now - s.yielded_ns >= YIELD_NS:
        sched_yield()
        s.yielded_ns = now
    spin(s)
    return True


cdef int wait(loop_state *s) noexcept nogil:
    """Sleep, and learn from it; 0 or -errno."""
    cdef uint64_t cpu_ns = 0
    cdef bint measured = s.wait.longest_ns != 0 and s.sleeps % SLEEPS_EACH == 0
    cdef int rc
    if measured:
        cpu_ns = thread_cpu_ns()
    rc = sleep(s)
    if measured:
        cpu_ns = thread_cpu_ns() - cpu_ns
    if s.wait.longest_ns:
        wakes(&s.wait, monotonic_ns(), cpu_ns)
    reap(s)
    return rc


cdef int run(loop_state *s) noexcept nogil:
    """Until the queue is drained or broken, or `leave`; 0 or -errno of a failed wait."""
    cdef uint32_t flags
    cdef int rc
    while not s.leave:
        flags = s.stepper.step(s.stepper.ctx, s.budget)
        if flags & (STEP_DRAINED | STEP_EXCHANGED | STEP_LEFT):
            if flags & STEP_DRAINED:
                return 0
            if flags & STEP_LEFT:
                leave_channel(s)
            else:
                change_storage(s)
            continue
        s.worked |= flags & STEP_WORKED
        arm(s)
        # At work too: what has come for others than those who keep us at work is not to wait.
        if reap(s) or flags & STEP_WORKED:
            if io_uring_sq_ready(&s.ring):
                io_uring_submit(&s.ring)
            has_work(&s.wait)
            s.nap_ns = s.watchdog_ns
            s.fresh = 1
            continue
        if s.holdoff_ns and s.fresh:
            rc = hold_off(s)
            if rc < 0:
                return rc
            continue
        if poll_on(s):
            if io_uring_sq_ready(&s.ring):
                io_uring_submit(&s.ring)
            continue
        acknowledge(s)
        if s.stepper.may_sleep(s.stepper.ctx) and storage_may_sleep(s):
            rc = wait(s)
            if rc < 0:
                return rc
    return 0


cdef class Loop:
    """A queue's loop: make it, `run` it in a thread of its own, `wake` it after any change.

    queue: an object with the stepper's capsule as ``ports``. budget: requests of one step; few, so
    that both ends work at once: one has the first while the other does the rest. watchdog_s:
    longest sleep, seconds. poll_s: longest time that is spent looking before a sleep, seconds; 0:
    none, as on a single CPU; None: as long as a sleep costs here. holdoff_s: how long it sleeps
    after work without asking for an event, seconds; then nothing is spent looking.
    """

    def __init__(self, queue, *, int budget=8, double watchdog_s=5.0, poll_s=0.0,
                 double holdoff_s=0.0):
        if self.open:
            raise LocalProtocolError("a loop is made once")
        self.keep = queue
        self.s.stepper = stepper_of(queue)
        self.s.budget = budget
        self.s.nap_ns = self.s.watchdog_ns = <long long>(watchdog_s * 1e9)
        self.s.holdoff_ns = <long long>(holdoff_s * 1e9)
        if self.s.holdoff_ns:
            poll_s = 0.0
        begin_waiting(&self.s.wait, -1.0 if poll_s is None else poll_s)
        self.s.unarmed = (1 << TAG_EVENT) | (1 << TAG_CONTROL) | (1 << TAG_ENGINE)
        rc = io_uring_queue_init(RING_ENTRIES, &self.s.ring, IORING_SETUP_CLAMP)
        if rc < 0:
            raise OSError(-rc, f"io_uring is not to be had ({os.strerror(-rc)}); see "
                               "/proc/sys/kernel/io_uring_disabled and the limits on memory")
        self.s.control_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        self.open = True
        if self.s.stepper.engine != NULL:
            self.s.stepper.engine.attach(self.s.stepper.engine.ctx, &self.s.ring)

    def __dealloc__(self):
        if self.open:
            io_uring_queue_exit(&self.s.ring)
            close(self.s.control_fd)

    def run(self):
        """Step and sleep until the queue is drained or broken; without the GIL."""
        cdef int rc
        with nogil:
            rc = run(&self.s)
        if rc < 0:
            raise OSError(-rc, f"waiting on io_uring failed: {errno.errorcode.get(-rc, rc)}")

    def wake(self):
        """Let the thread step now. Any thread."""
        cdef uint64_t one = 1
        write(self.s.control_fd, &one, 8)

    def replace(self, queue):
        """Let the thread step this in the place of what it steps, which it steps in turn: on the
        same event channel, with no storage of its own. Any thread, once."""
        self.keep = (self.keep, queue)
        self.s.following = stepper_of(queue)
        xvd_store_release(&self.s.replaced, 1)
        self.wake()

    def leave(self):
        """Let the thread return as soon as it can, whatever is in flight. Any thread."""
        self.s.leave = 1
        self.wake()

    @property
    def nap_s(self):
        """The longest sleep as of now, in seconds."""
        return self.s.nap_ns / 1e9

    def counters(self):
        """How often the thread slept, was woken, by the watchdog, and by events for nothing.

        poll_ns: for how long it looks before it sleeps, as of now. poll_max_ns: at most.
        """
        return {"sleeps": self.s.sleeps, "wakeups": self.s.wakeups, "watchdogs": self.s.watchdogs,
                "spurious": self.s.spurious, "poll_ns": self.s.wait.look_ns,
                "poll_max_ns": self.s.wait.longest_ns}
