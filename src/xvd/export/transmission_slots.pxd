# SPDX-License-Identifier: Apache-2.0
# Inline header of export/.
"""Room for requests: a fixed number of slots, and buffers that stay with them.

Every byte of data counts against its client from the header of its request to the end of the reply.
A free slot keeps its buffer, up to a total; large ones are fresh pages, so that a payload that is
announced and never sent takes no memory.

Where the queue has pages for it, data lies in those that the backend reads and fills, and goes
between them and the socket; the slot's buffer is for what finds no place there, and for what has to
leave it.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy
from posix.mman cimport (MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap,
                         munmap)
from posix.uio cimport iovec

from xvd.dataplane.c cimport xvd_load_acquire
from xvd.export.memory cimport give_memory, has_memory, take_memory
from xvd.export.transmission cimport SLOT_FREE, SLOT_READY, put, slot, transmission


cdef enum:
    IDLE_MAX = 16 << 20          # bytes of buffers that free slots keep
    FINE = 4096                  # what small capacities are multiples of
    COARSE = 64 * 1024           # and large ones
    PAGES_FROM = 1 << 20         # buffers from this size on are pages of their own
    PARTS = 64                   # of data that is copied, at a time


cdef inline size_t rounded(size_t size) noexcept nogil:
    cdef size_t unit = FINE if size <= COARSE else COARSE
    return (size + unit - 1) // unit * unit


cdef inline void drop_buffer(transmission *t, slot *s) noexcept nogil:
    if s.buffer != NULL:
        give_memory(t.memory, s.capacity)
        if s.capacity >= PAGES_FROM:
            munmap(s.buffer, s.capacity)
        else:
            free(s.buffer)
    s.buffer = NULL
    s.capacity = 0


cdef inline bint ensure_buffer(transmission *t, slot *s, size_t capacity) noexcept nogil:
    """A buffer of exactly this capacity in the place of the slot's; False without memory."""
    cdef void *memory
    drop_buffer(t, s)
    if capacity >= PAGES_FROM:
        memory = mmap(NULL, capacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if memory == MAP_FAILED:
            return False
    else:
        memory = malloc(capacity)
        if memory == NULL:
            return False
    s.buffer = <uint8_t *>memory
    s.capacity = capacity
    take_memory(t.memory, capacity)
    return True


# ---- Where the data lies ---------------------------------------------------------------------

cdef inline uint32_t data_parts(const slot *s, size_t offset, size_t size, iovec *parts,
                                uint32_t room) noexcept nogil:
    """`size` bytes of a request's data from `offset` on, or the first of them that `room` parts
    hold; how many parts."""
    if s.io.in_place:
        return s.io.client.host.parts(s.io.client.host.ctx, &s.io, offset, size, parts, room)
    parts[0].iov_base = s.buffer + offset
    parts[0].iov_len = size
    return 1


cdef inline void copy_data(const slot *s, size_t offset, uint8_t *other, size_t size,
                           bint to_slot) noexcept nogil:
    """Between a request's data and memory of ours."""
    cdef iovec parts[PARTS]
    cdef uint32_t n, i
    cdef size_t done = 0
    while done < size:
        n = data_parts(s, offset + done, size - done, parts, PARTS)
        for i in range(n):
            if to_slot:
                memcpy(parts[i].iov_base, other + done, parts[i].iov_len)
            else:
                memcpy(other + done, parts[i].iov_base, parts[i].iov_len)
            done += parts[i].iov_len


cdef inline void unplace(slot *s, size_t wanted) noexcept nogil:
    """Its data into the slot's buffer, the first `wanted` bytes of it; the pages go back."""
    if s.io.in_place:
        copy_data(s, 0, s.buffer, wanted, False)
        s.io.client.host.displace(s.io.client.host.ctx, &s.io)


# ---- Slots -----------------------------------------------------------------------------------

cdef inline bint has_room(transmission *t, size_t size) noexcept nogil:
    """Whether the client may have another request, with so many bytes of data."""
    if t.free == NULL or t.held + rounded(size) > t.bytes_max:
        return False
    return t.free.capacity >= rounded(size) or has_memory(t.memory, rounded(size))


cdef inline void drop_idle(transmission *t) noexcept nogil:
    """Give back the buffers that no request uses: somebody waits for memory."""
    cdef slot *s = t.free
    while s != NULL:
        drop_buffer(t, s)
        s = s.next
    t.idle = 0


cdef inline slot *take_slot(transmission *t, size_t size) noexcept nogil:
    """A slot, there is room, with a buffer of `size` bytes; NULL without memory."""
    cdef slot *s = t.free
    cdef size_t needed = rounded(size)
    t.free = s.next
    t.idle -= s.capacity
    t.in_use += 1
    t.in_progress += 1
    s.charge = 0
    if size == 0:
        return s
    if s.capacity < needed or t.held + s.capacity > t.bytes_max:
        if not ensure_buffer(t, s, needed):
            free_slot(t, s)
            return NULL
    s.charge = s.capacity
    t.held += s.charge
    return s


cdef inline void free_slot(transmission *t, slot *s) noexcept nogil:
    unplace(s, 0)
    t.in_progress -= s.state != SLOT_READY
    t.in_use -= 1
    t.held -= s.charge
    s.charge = 0
    if t.idle + s.capacity > IDLE_MAX or xvd_load_acquire(&t.memory.starved):
        drop_buffer(t, s)
    t.idle += s.capacity
    s.state = SLOT_FREE
    s.next = t.free
    t.free = s


cdef inline void make_ready(transmission *t, slot *s) noexcept nogil:
    """The reply is complete; what it does not carry is not held any longer."""
    if s.body_size == 0:
        t.held -= s.charge
        s.charge = 0
    t.in_progress -= 1
    s.state = SLOT_READY
    put(&t.ready, s)
