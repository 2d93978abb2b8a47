# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""One end of an event channel: a port in the shared table, and an eventfd for each end.

Sending sets the remote port's pending mark and, if it was clear, writes the remote end's eventfd:
events on a pending port collapse into one, as on Xen. Consuming clears the eventfd first and the
mark second. An event that arrives between the two finds the mark still set and writes nothing; but
its sender published its ring index before, and the ring is read after the mark is clear. Who
polls by edges leaves the eventfd as it is: every write to it ends a wait, whatever it holds.
"""

from libc.stdint cimport uint32_t, uint64_t
from posix.fcntl cimport F_DUPFD_CLOEXEC, fcntl
from posix.unistd cimport close, read, write

from xvd.dataplane.c cimport xvd_exchange32, xvd_load_acquire
from xvd.dataplane.ports cimport event_ports, wrap
from xvd.machine.emulated.shared cimport PORT_INTERDOMAIN, DomainState, port_slot


cdef struct channel:
    port_slot *slot
    port_slot *peer_slots
    uint32_t nr_peer_slots
    int fd
    int peer_fd


cdef void notify(void *ctx) noexcept nogil:
    cdef channel *c = <channel *>ctx
    cdef uint64_t one = 1
    cdef uint32_t remote
    if xvd_load_acquire(&c.slot.state) != PORT_INTERDOMAIN:
        return
    remote = c.slot.remote_port
    c.slot.sent += 1
    if remote < c.nr_peer_slots and xvd_exchange32(&c.peer_slots[remote].pending, 1) == 0:
        write(c.peer_fd, &one, 8)


cdef int acknowledge(void *ctx, void *io_uring) noexcept nogil:
    xvd_exchange32(&(<channel *>ctx).slot.pending, 0)
    return 1


cdef int consume(channel *c) noexcept nogil:
    cdef uint64_t drained = 0
    read(c.fd, &drained, 8)
    return xvd_exchange32(&c.slot.pending, 0)


cdef class EmulatedEventChannel:
    """`EventChannel`. Any thread. Keeps its own duplicates of the two descriptors."""

    cdef channel c
    cdef event_ports table
    cdef DomainState own, peer
    cdef object release
    cdef readonly int port

    def __cinit__(self, DomainState own, DomainState peer, int port, int fd, int peer_fd, release):
        if not 0 < <uint32_t>port < own.c.nr_slots:
            raise IndexError(f"port {port}")
        self.own = own
        self.peer = peer
        self.port = port
        self.release = release
        self.c.slot = &own.c.slots[port]
        self.c.peer_slots = peer.c.slots
        self.c.nr_peer_slots = peer.c.nr_slots
        self.c.fd = fcntl(fd, F_DUPFD_CLOEXEC, 0)
        self.c.peer_fd = fcntl(peer_fd, F_DUPFD_CLOEXEC, 0)
        self.table.ctx = &self.c
        self.table.fd = self.c.fd
        self.table.notify = notify
        self.table.acknowledge = acknowledge

    def __dealloc__(self):
        close(self.c.fd)
        close(self.c.peer_fd)

    @property
    def ports(self):
        """Capsule ``xvd.event_ports``."""
        return wrap(&self.table, "xvd.event_ports")

    @property
    def bound(self):
        """Whether the other end is bound at this moment."""
        return xvd_load_acquire(&self.c.slot.state) == PORT_INTERDOMAIN

    @property
    def sent(self):
        """How many events this port has sent since the machine came up."""
        return self.c.slot.sent

    def fileno(self):
        """A descriptor that is readable while an event is pending."""
        return self.c.fd

    def notify(self):
        """Send an event."""
        notify(&self.c)

    def consume(self):
        """Acknowledge: True if an event was pending."""
        return bool(consume(&self.c))

    def close(self):
        """Unbind."""
        if self.release is not None:
            release, self.release = self.release, None
            release(self.port)
