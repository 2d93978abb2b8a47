# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""A queue without a thread: whoever moves the time himself steps it, and gives it its events."""

from libc.stdint cimport uint32_t, uint64_t
from posix.unistd cimport read

from xvd.dataplane.ports cimport stepper_of, stepper_ports

cdef extern from "poll.h" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *fds, unsigned long n, int timeout)
    enum:
        POLLIN


cdef class Stepped:
    """What a `Loop` does, one piece at a time. queue: an object with the stepper's capsule as
    ``ports``. Storage completes into the queue's own memory here: what has io_uring or a descriptor
    of its own needs a `Loop`."""

    cdef stepper_ports *stepper
    cdef object keep

    def __init__(self, queue):
        self.keep = queue
        self.stepper = stepper_of(queue)

    def step(self, uint32_t budget):
        """One step; `step_flag`s: 1 something moved, 2 the peer broke the ring, 4 drained."""
        cdef uint32_t flags
        with nogil:
            flags = self.stepper.step(self.stepper.ctx, budget)
        return flags

    def may_sleep(self):
        """Ask for an event and look once more; False if there is work after all."""
        return bool(self.stepper.may_sleep(self.stepper.ctx))

    @property
    def due_ns(self):
        """When to step again though nothing happens; 0: never."""
        return 0 if self.stepper.due_ns == NULL else self.stepper.due_ns[0]

    @property
    def has_event(self):
        """Whether an event has come that was not taken."""
        cdef pollfd one
        one.fd = self.stepper.events.fd
        one.events = POLLIN
        return poll(&one, 1, 0) > 0

    def take_event(self):
        """Acknowledge the event, so that the next one can come."""
        cdef uint64_t count
        read(self.stepper.events.fd, &count, 8)
        self.stepper.events.acknowledge(self.stepper.events.ctx, NULL)
