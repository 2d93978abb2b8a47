# SPDX-License-Identifier: Apache-2.0
"""Clients of a disk, stepped together (clients.pyx)."""

from libc.stdint cimport uint32_t, uint64_t

from xvd.dataplane.front.queue cimport FrontQueue, front_queue, pthread_mutex_t
from xvd.dataplane.front.range_lock cimport RangeLock, range_lock
from xvd.dataplane.liburing cimport io_uring
from xvd.dataplane.ports cimport client_host, client_ports, engine_ports, front_io, stepper_ports


cdef struct client_set:
    range_lock *lock
    front_queue *queue           # NULL: every operation goes the long way
    client_host host
    client_ports *first          # the stepping thread's
    io_uring *ring               # its loop's
    pthread_mutex_t mutex        # guards the next
    client_ports *joining
    uint32_t news                # somebody is joining


cdef uint32_t step_clients(client_set *c) noexcept nogil
cdef void welcome(client_set *c) noexcept nogil
cdef void welcome_nobody(client_set *c) noexcept nogil


cdef class ClientSet:
    cdef client_set c
    cdef RangeLock lock
    cdef dict members
    cdef FrontQueue queue        # here, and not below: it has to outlive what __dealloc__ forgets


cdef class Clients(ClientSet):
    cdef stepper_ports table
    cdef engine_ports poller
