# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""For how long a thread looks for work before it sleeps.

A sleep costs both ends an event, and time; looking costs a CPU. Whoever looks for as long as a
sleep and a wake-up cost, and sleeps then, has never used more than twice the least (the ski rental
problem). What they cost here is measured once in a process, between two threads, and followed by
what this thread's own sleeps cost it since: an event of Xen takes hypercalls, one of the emulated
machine does not, and an emulated CPU is slow at either.

That is the longest look. The next one is found out by what it would have gained, as KVM does for
idle CPUs: twice as long after a sleep that it would have spared, half as long after another, so an
idle disk does not look at all. What comes while both ends sleep is heard late, and a look would
have found it sooner; so a sleep that was somewhat longer than the longest look counts as spared
too, unless looks have shown that what is waited for comes no sooner, as from a disk.

A CPU may be needed by others. Those who are ready to run in this kernel get it offered. A guest
beneath the same hypervisor cannot say so, but its turn shows, as theirs does, by a gap between two
looks. Every gap is owed a pause so many times as long, and pauses pass by themselves; while more is
owed than a host's own noise comes to, there are no looks (a leaky bucket counted in time, as by the
GCRA of ITU-T I.371).
"""

from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from posix.time cimport CLOCK_THREAD_CPUTIME_ID, clock_gettime, timespec
from posix.unistd cimport close, read, write

from xvd.dataplane.c cimport monotonic_ns

import contextlib
import os
import threading

cdef enum:
    HOPS = 8                     # there and back, of one measurement
    MEASUREMENTS = 4             # the best is believed: the others were disturbed
    LOOK_LEAST_NS = 4000
    GAP_LEAST_NS = 100000
    GAP_HOPS = 8                 # so many times what a wake-up takes is no look that went on
    PAUSE_GAPS = 16              # a gap is owed a pause so many times as long
    PAUSE_MOST_NS = 1000000000
    OWED_MAX_NS = 100000000      # and so much of it is nothing but noise
    IN_VAIN_WEIGHT = 16          # of a look in vain, beside a chance for one that was not taken
    IN_VAIN_FREE = 8 * IN_VAIN_WEIGHT
    IN_VAIN_MAX = IN_VAIN_FREE + IN_VAIN_WEIGHT
    # What a sleep is believed to cost at most, beside one between two threads. A thread's clock
    # goes on while another guest has its CPU: one sleep in some would seem to cost milliseconds.
    SLEEP_HOPS = 4

cdef uint64_t BY_COST = <uint64_t>-1

# Of this process, in nanoseconds; 0: not measured yet.
cdef uint64_t hop_ns = 0         # from a thread's word to where another, which slept, has it
cdef uint64_t hop_cpu_ns = 0     # CPU of the one that slept


cdef uint64_t thread_cpu_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now)
    return <uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec


cdef void hear(int fd) noexcept nogil:
    """Wait for a word; a signal is none."""
    cdef uint64_t word
    while read(fd, &word, 8) < 0 and errno == EINTR:
        pass


cdef void bounce(int mine, int theirs, uint32_t times, bint first) noexcept nogil:
    """Wait for a word and give one back, `times`; or the other way round."""
    cdef uint64_t word = 1
    cdef uint32_t i
    for i in range(times):
        if first:
            write(theirs, &word, 8)
        hear(mine)
        if not first:
            write(theirs, &word, 8)


def _stay_on(cpus):
    """Bind this thread to one CPU, or to those that it had before."""
    with contextlib.suppress(OSError):  # not allowed: it is measured where the kernel puts us
        os.sched_setaffinity(0, cpus)


def _answer(int mine, int theirs, cpu):
    _stay_on({cpu})
    with nogil:
        bounce(mine, theirs, HOPS * MEASUREMENTS, False)


cdef measure_hops():
    """Let two threads wake each other in turns; the best of some tries. On two CPUs: a word to
    another thread of one's own CPU is far cheaper, and no two ends of a ring are so placed."""
    global hop_ns, hop_cpu_ns
    cdef int mine = os.eventfd(0, os.EFD_CLOEXEC), theirs = os.eventfd(0, os.EFD_CLOEXEC)
    cdef uint64_t begun, cpu, best = BY_COST, best_cpu = 0
    cpus = os.sched_getaffinity(0)
    other = threading.Thread(target=_answer, args=(theirs, mine, max(cpus)), daemon=True)
    other.start()
    _stay_on({min(cpus)})
    for _ in range(MEASUREMENTS):
        with nogil:
            cpu = thread_cpu_ns()
            begun = monotonic_ns()
            bounce(mine, theirs, HOPS, True)
            begun = monotonic_ns() - begun
            cpu = thread_cpu_ns() - cpu
        if begun < best:
            best, best_cpu = begun, cpu
    _stay_on(cpus)
    other.join()
    close(mine)
    close(theirs)
    hop_ns = max(best // (2 * HOPS), <uint64_t>1)
    hop_cpu_ns = max(best_cpu // HOPS, <uint64_t>1)


def sleep_cost_s():
    """What a sleep and a wake-up cost here, in seconds, as measured once in this process."""
    if hop_ns == 0:
        measure_hops()
    return hop_ns / 1e9


cdef void begin_waiting(waiting *w, double most_s):
    """most_s: the longest look, in seconds; negative: what a sleep costs.

    On a single CPU nobody looks: it would only keep the other end from its work.
    """
    if most_s == 0 or len(os.sched_getaffinity(0)) < 2:
        start(w, 1, 1, 0)
        return
    sleep_cost_s()
    start(w, hop_ns, hop_cpu_ns, BY_COST if most_s < 0 else <uint64_t>(most_s * 1e9))


# ---- The rule: it knows no clock but the one it is told ------------------------------------------

cdef void start(waiting *w, uint64_t hop_ns, uint64_t hop_cpu_ns, uint64_t set_ns) noexcept nogil:
    w.hop_ns, w.hop_cpu_ns, w.set_ns = hop_ns, hop_cpu_ns, set_ns
    w.sleep_cpu_ns = hop_cpu_ns
    set_longest(w)
    w.look_ns = w.longest_ns


cdef void set_longest(waiting *w) noexcept nogil:
    # No sleep is cheaper than one between two threads.
    w.cost_ns = max(w.hop_ns, w.hop_ns * w.sleep_cpu_ns // w.hop_cpu_ns)
    w.longest_ns = w.cost_ns if w.set_ns == BY_COST else w.set_ns


cdef bint was_interrupted(const waiting *w, uint64_t now) noexcept nogil:
    """Whether the last look is too long ago for a thread that had its CPU. Whoever was told by hand
    how long to look does it."""
    return (w.looked_ns and w.set_ns == BY_COST
            and now - w.looked_ns > max(GAP_HOPS * w.hop_ns, <uint64_t>GAP_LEAST_NS))


cdef bint look_on(waiting *w, uint64_t now) noexcept nogil:
    """Whether to look once more instead of sleeping, after nothing was found."""
    if w.idle_since_ns == 0:
        w.idle_since_ns = now
    if was_interrupted(w, now):
        w.paid_ns = min(max(w.paid_ns, now) + PAUSE_GAPS * (now - w.looked_ns),
                        now + OWED_MAX_NS + PAUSE_MOST_NS)
        w.looked_ns = now        # a gap is counted once
    if w.paid_ns > now + OWED_MAX_NS or now - w.idle_since_ns >= w.look_ns:
        return False
    w.looked_ns = now
    return True


cdef void has_work(waiting *w) noexcept nogil:
    """Something was found."""
    if w.looked_ns and w.in_vain:
        w.in_vain -= min(w.in_vain, <uint32_t>IN_VAIN_WEIGHT)
    w.idle_since_ns = w.looked_ns = 0


cdef bint would_be_spared(waiting *w, uint64_t idle_ns) noexcept nogil:
    """Whether a longer look might have found what ended a sleep, after so long without work."""
    if idle_ns < w.longest_ns + w.cost_ns:
        return True
    # What comes while both ends sleep is heard two wake-ups later, and none is as quick as the best
    # one. Who left that out would never look again beside another who does the same.
    if idle_ns >= w.longest_ns + 3 * w.cost_ns:
        return False
    if w.look_ns == w.longest_ns:
        w.in_vain = min(w.in_vain + IN_VAIN_WEIGHT, <uint32_t>IN_VAIN_MAX)
    elif w.in_vain:
        w.in_vain -= 1
    return w.in_vain < IN_VAIN_FREE


cdef void wakes(waiting *w, uint64_t now, uint64_t cpu_ns) noexcept nogil:
    """After a sleep: what did it cost, and would looking for longer have spared it?

    cpu_ns: what it cost this thread; 0: not measured.
    """
    if cpu_ns:
        cpu_ns = min(cpu_ns, SLEEP_HOPS * w.hop_cpu_ns)
        w.sleep_cpu_ns += (<int64_t>cpu_ns - <int64_t>w.sleep_cpu_ns) // 4
        set_longest(w)
    if would_be_spared(w, now - w.idle_since_ns):
        w.look_ns = min(max(w.look_ns * 2, <uint64_t>LOOK_LEAST_NS), w.longest_ns)
    else:
        w.look_ns = w.look_ns // 2 if w.look_ns > LOOK_LEAST_NS else 0
    w.idle_since_ns = w.looked_ns = 0


cdef class Waiting:
    """The rule as an object, for tests: nanoseconds by any clock. set_ns: None for what a sleep
    costs."""

    cdef waiting w

    def __init__(self, uint64_t hop_ns, uint64_t hop_cpu_ns, set_ns=None):
        start(&self.w, hop_ns, hop_cpu_ns, BY_COST if set_ns is None else set_ns)

    def look_on(self, uint64_t now):
        """See `look_on`; 0 is no time."""
        return bool(look_on(&self.w, now))

    def has_work(self):
        """Say that the last look found something."""
        has_work(&self.w)

    def wakes(self, uint64_t now, uint64_t cpu_ns=0):
        """Say that a sleep has ended."""
        wakes(&self.w, now, cpu_ns)

    @property
    def longest_ns(self):
        """The longest look."""
        return self.w.longest_ns

    @property
    def look_ns(self):
        """The next look."""
        return self.w.look_ns
