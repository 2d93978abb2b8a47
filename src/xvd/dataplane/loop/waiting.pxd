# SPDX-License-Identifier: Apache-2.0
"""For how long a thread looks for work before it sleeps."""

from libc.stdint cimport uint32_t, uint64_t


cdef struct waiting:
    uint64_t hop_ns              # what a sleep and a wake-up between two threads take
    uint64_t hop_cpu_ns          # and cost the one that slept, of CPU
    uint64_t sleep_cpu_ns        # what a sleep costs this thread, on average
    uint64_t set_ns              # the longest look, where it was set
    uint64_t cost_ns             # what a sleep and a wake-up take this thread
    uint64_t longest_ns          # the longest look as of now
    uint64_t look_ns             # for how long to look next
    uint64_t idle_since_ns       # nothing was to be done since then; 0: something was
    uint64_t looked_ns           # the last look since; 0: none
    uint64_t paid_ns             # when all that is owed for gaps will have passed
    uint32_t in_vain             # longest looks after which there was a sleep all the same, weighed


cdef uint64_t thread_cpu_ns() noexcept nogil
cdef void begin_waiting(waiting *w, double most_s)
cdef bint look_on(waiting *w, uint64_t now) noexcept nogil
cdef void has_work(waiting *w) noexcept nogil
cdef void wakes(waiting *w, uint64_t now, uint64_t cpu_ns) noexcept nogil
