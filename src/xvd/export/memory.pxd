# SPDX-License-Identifier: Apache-2.0
# Inline header of export/.
"""The buffers of all clients of an export together, whichever threads step them.

A buffer counts from when it is made until it is given back, also while a free request keeps it: so
a request that finds one costs nothing here. Where there is no room a client waits, and `starved`
says so: whoever steps then keeps no buffer that is not in use. The bell tells the event loop, which
wakes who waits when there is room again, and cuts off who holds some and does nothing with it.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t
from posix.unistd cimport write

from xvd.dataplane.c cimport xvd_add64, xvd_exchange32, xvd_load64, xvd_load_acquire


cdef struct export_memory:
    uint64_t limit
    uint64_t used
    uint32_t starved             # 1: somebody waits for room
    int bell


cdef inline void ring_memory_bell(export_memory *m) noexcept nogil:
    cdef uint64_t one = 1
    write(m.bell, &one, 8)


cdef inline bint has_memory(export_memory *m, size_t size) noexcept nogil:
    """Whether so much may be taken now; if not, somebody waits for it from now on.

    Threads that ask at the same time may all be told so: each for one request.
    """
    if xvd_load64(&m.used) + size <= m.limit:
        return True
    if xvd_exchange32(&m.starved, 1) == 0:
        ring_memory_bell(m)
    return False


cdef inline void take_memory(export_memory *m, size_t size) noexcept nogil:
    xvd_add64(&m.used, size)


cdef inline void give_memory(export_memory *m, size_t size) noexcept nogil:
    xvd_add64(&m.used, <uint64_t>0 - size)
    if xvd_load_acquire(&m.starved) and xvd_exchange32(&m.starved, 0):
        ring_memory_bell(m)


cdef class ExportMemory:
    cdef export_memory m
