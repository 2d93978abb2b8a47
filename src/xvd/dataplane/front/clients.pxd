# SPDX-License-Identifier: Apache-2.0
"""Clients of a disk in the threads of its queues (clients.pyx)."""

from libc.stdint cimport uint32_t, uint64_t

from xvd.dataplane.front.queue cimport FrontQueue, front_queue, pthread_mutex_t
from xvd.dataplane.liburing cimport io_uring
from xvd.dataplane.ports cimport client_host, client_ports, engine_ports, front_io, stepper_ports


# Sectors on which no client's write may begin.
cdef struct hold:
    uint64_t first, end
    uint64_t token
    hold *next

cdef struct fence_state:
    pthread_mutex_t mutex        # guards all of it
    uint64_t sectors             # of the disk
    uint32_t block_sectors
    uint32_t writable
    uint32_t flushes             # the backend takes a flush
    hold *holds
    front_io *writes             # of all clients, under way
    int fd                       # while something is held: rung when one of them ends

cdef struct client_set:
    fence_state *fence
    front_queue *queue           # NULL: every operation goes the long way
    client_host host
    client_ports *first          # the stepping thread's
    io_uring *ring               # its loop's
    pthread_mutex_t mutex        # guards the next
    client_ports *joining
    uint32_t news                # somebody is joining


cdef class Fence:
    cdef fence_state f
    cdef uint64_t last


cdef class Clients:
    cdef client_set c
    cdef stepper_ports table
    cdef engine_ports poller
    cdef Fence fence
    cdef FrontQueue queue
    cdef dict members
