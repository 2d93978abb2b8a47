# SPDX-License-Identifier: Apache-2.0
"""The loop that one native thread runs for one queue."""

from libc.stdint cimport uint32_t, uint64_t

from xvd.dataplane.liburing cimport io_uring
from xvd.dataplane.loop.waiting cimport waiting
from xvd.dataplane.ports cimport stepper_ports


# What a completion is about; anything above is the address of an engine_io.
cdef enum wake_tag:
    TAG_EVENT = 1                # the event channel
    TAG_CONTROL = 2              # `wake`, `finish`
    TAG_ENGINE = 3               # the engine's own descriptor
    TAG_EXCHANGED = 4            # the end of the poll of an earlier engine's
    TAG_LEFT = 5                 # the end of the event channel's poll
    TAG_LAST = 5

cdef struct loop_state:
    io_uring ring
    stepper_ports *stepper
    stepper_ports *following     # what takes its place
    uint32_t replaced            # `following` is there and not stepped yet
    int control_fd
    int budget
    long long watchdog_ns        # the longest sleep after something was done
    long long nap_ns             # and the longest one now
    uint32_t leave               # set by `leave`: stop stepping, whatever is in flight
    uint32_t unarmed             # bit 1 << tag for each poll that is to be armed (again)
    uint32_t event               # one has come and is not acknowledged
    uint32_t worked              # something was done since the last one was
    uint32_t idle_events         # in a row that led to nothing
    uint64_t event_due_ns        # when it is to be acknowledged; 0: not decided
    waiting wait                 # for how long to look before a sleep
    uint64_t yielded_ns          # when others last had the CPU offered
    long long holdoff_ns         # how long to sleep after work without hearing of more
    uint32_t fresh               # something was done since the last sleep
    uint64_t sleeps, wakeups, watchdogs, spurious


cdef class Loop:
    cdef loop_state s
    cdef bint open
    cdef object keep
