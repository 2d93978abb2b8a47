# SPDX-License-Identifier: Apache-2.0
# Inline header of engines/.
"""What was written through a channel since the last flush, to be written again.

A storage daemon that dies takes with it what it had not written out: the tables of an image format,
and with them data that was answered for. As long as its host lives a guest may count on that data,
so it is kept here until a flush has ended that began after it was answered for.

It lies in a circle of bytes, each record behind the one before.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy


cdef enum:
    KEPT_ZEROES = 16             # an `op` of a record, besides those of operations
    UNFLUSHED_BYTES = 16 << 20   # for all that a channel has written and not flushed

cdef struct record:
    uint64_t order               # over all channels of the storage
    uint64_t offset
    uint64_t length
    uint32_t op                  # ENGINE_WRITE, and then the data follows; ENGINE_DISCARD;
                                 # KEPT_ZEROES, a write without data

cdef struct unflushed:
    uint8_t *bytes
    uint64_t head                # positions, which only grow: where the next record goes,
    uint64_t tail                # and where the oldest begins
    uint64_t reserved            # for what is in flight


cdef inline uint64_t size_in_log(uint64_t length) noexcept nogil:
    """Of a record with so many bytes of data."""
    return sizeof(record) + length


cdef inline bint has_room(const unflushed *u, uint64_t size) noexcept nogil:
    return u.head - u.tail + u.reserved + size <= UNFLUSHED_BYTES


cdef inline bint is_half_full(const unflushed *u) noexcept nogil:
    return u.head - u.tail > UNFLUSHED_BYTES // 2


cdef inline void put_bytes(unflushed *u, const void *data, uint64_t size) noexcept nogil:
    cdef uint64_t at = u.head % UNFLUSHED_BYTES
    cdef uint64_t first = min(size, UNFLUSHED_BYTES - at)
    memcpy(u.bytes + at, data, first)
    memcpy(u.bytes, <const uint8_t *>data + first, size - first)
    u.head += size


cdef inline void get_bytes(const unflushed *u, uint64_t position, void *to,
                           uint64_t size) noexcept nogil:
    cdef uint64_t at = position % UNFLUSHED_BYTES
    cdef uint64_t first = min(size, UNFLUSHED_BYTES - at)
    memcpy(to, u.bytes + at, first)
    memcpy(<uint8_t *>to + first, u.bytes, size - first)


cdef inline void keep(unflushed *u, const record *what, const void *data) noexcept nogil:
    """Put a record behind the others: what was reserved for it is used now."""
    put_bytes(u, what, sizeof(record))
    if data != NULL:
        put_bytes(u, data, what.length)
