# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""One end of an event channel on real Xen: an open /dev/xen/evtchn of its own.

One descriptor for each port makes the descriptor's readiness the port's, so that a queue's thread
waits on it directly and nobody has to sort events. A port that was read stays masked until its
number is written back; an event that arrives meanwhile is kept by Xen and delivered then. So both
may be done by the same system call that waits for the next event.
"""

from cpython.exc cimport PyErr_SetFromErrno
from libc.stdint cimport uint16_t, uint32_t
from posix.unistd cimport close, read, write

from xvd.dataplane.liburing cimport (
    IOSQE_CQE_SKIP_SUCCESS, io_uring, io_uring_get_sqe, io_uring_prep_read, io_uring_prep_write,
    io_uring_sq_space_left, io_uring_sqe, io_uring_sqe_set_data64, io_uring_sqe_set_flags)
from xvd.dataplane.ports cimport event_ports, wrap
from xvd.machine.xen.devices cimport (
    XVD_EVTCHN_BIND_INTERDOMAIN, XVD_EVTCHN_BIND_UNBOUND, XVD_EVTCHN_NOTIFY, XVD_EVTCHN_RESTRICT,
    ioctl, xvd_bind_interdomain)

import errno
import os

from xvd.errors import EventChannelError
from xvd.machine.xen.here import EVTCHN


_REMEDIES = {
    errno.ENOENT: "this is no Xen domain, or its driver is missing: modprobe xen-evtchn",
    errno.EACCES: "run it as root, or give it access to the device",
    errno.EINVAL: "the peer has no such port, or not for this domain",
    errno.ENOSPC: "all event channels of this domain are taken: raise max_event_channels",
    errno.ESRCH: "there is no such domain",
}


cdef struct channel:
    int fd                       # -1: closed
    uint32_t port
    uint32_t read                # where the port's number goes that says there was an event


cdef void notify(void *ctx) noexcept nogil:
    # ENOTCONN says that nobody is bound at the other end: then nobody needs to know.
    cdef channel *c = <channel *>ctx
    ioctl(c.fd, XVD_EVTCHN_NOTIFY, &c.port)


cdef int acknowledge(void *ctx, void *ring) noexcept nogil:
    """Both end at once, as the descriptor is one that does not block; the order matters."""
    cdef channel *c = <channel *>ctx
    cdef io_uring_sqe *sqe
    if io_uring_sq_space_left(<io_uring *>ring) < 2:
        return 0
    sqe = io_uring_get_sqe(<io_uring *>ring)
    io_uring_prep_read(sqe, c.fd, &c.read, sizeof(c.read), 0)
    io_uring_sqe_set_flags(sqe, IOSQE_CQE_SKIP_SUCCESS)
    io_uring_sqe_set_data64(sqe, 0)
    sqe = io_uring_get_sqe(<io_uring *>ring)
    io_uring_prep_write(sqe, c.fd, &c.port, sizeof(c.port), 0)
    io_uring_sqe_set_flags(sqe, IOSQE_CQE_SKIP_SUCCESS)
    io_uring_sqe_set_data64(sqe, 0)
    return 1


cdef int consume(channel *c) noexcept nogil:
    cdef uint32_t port = 0
    if read(c.fd, &port, sizeof(port)) != sizeof(port):
        return 0
    write(c.fd, &port, sizeof(port))
    return 1


cdef class XenEventChannel:
    """`EventChannel`. Any thread. Made by `alloc_unbound` or `bind_interdomain`."""

    cdef channel c
    cdef event_ports table
    cdef object __weakref__

    def __cinit__(self):
        self.c.fd = -1
        self.table.ctx = &self.c
        self.table.fd = -1
        self.table.notify = notify
        self.table.acknowledge = acknowledge

    def __dealloc__(self):
        if self.c.fd >= 0:
            close(self.c.fd)

    @staticmethod
    def alloc_unbound(uint32_t peer):
        """A new end to which only `peer` may bind; raises `EventChannelError`."""
        cdef XenEventChannel end = XenEventChannel()
        end.bind(XVD_EVTCHN_BIND_UNBOUND, &peer, peer, "make an event channel")
        return end

    @staticmethod
    def bind_interdomain(uint32_t peer, uint32_t port):
        """Bind to the peer's unbound end, with one event pending; raises `EventChannelError`."""
        cdef XenEventChannel end = XenEventChannel()
        cdef xvd_bind_interdomain wanted
        wanted.remote_domain = peer
        wanted.remote_port = port
        end.bind(XVD_EVTCHN_BIND_INTERDOMAIN, &wanted, peer, f"bind to event channel {port}")
        return end

    cdef bind(self, unsigned long request, void *argument, uint32_t peer, what):
        cdef int rc
        cdef uint16_t domid = peer
        try:
            self.c.fd = os.open(EVTCHN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            rc = ioctl(self.c.fd, request, argument)
            if rc < 0:
                PyErr_SetFromErrno(OSError)
        except OSError as error:
            self.close()
            remedy = _REMEDIES.get(error.errno, "see the kernel's log")
            raise EventChannelError(f"cannot {what} of domain {peer}: {error.strerror}; {remedy}",
                                    error.errno) from None
        self.c.port = rc
        self.table.fd = self.c.fd
        # From now on this descriptor binds to nobody else, whoever gets hold of it. The kernel
        # refuses it for domain 0 and older ones do not know it: it is a second fence, no more.
        ioctl(self.c.fd, XVD_EVTCHN_RESTRICT, &domid)

    @property
    def port(self):
        """The number of our end."""
        return self.c.port

    @property
    def ports(self):
        """Capsule ``xvd.event_ports``."""
        return wrap(&self.table, "xvd.event_ports")

    def fileno(self):
        """A descriptor that is readable while an event is pending; -1 once closed."""
        return self.c.fd

    def notify(self):
        """Send an event."""
        notify(&self.c)

    def consume(self):
        """Acknowledge: True if an event was pending."""
        return bool(consume(&self.c))

    def close(self):
        """Unbind; the peer's end goes back to unbound, for this domain only."""
        if self.c.fd >= 0:
            close(self.c.fd)
            self.c.fd = self.table.fd = -1
