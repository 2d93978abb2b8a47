# SPDX-License-Identifier: Apache-2.0
# Inline header of engines/.
"""A map of what was changed, as compiled channels mark it; see changes.pyx."""

from libc.stdint cimport uint64_t

from xvd.dataplane.c cimport xvd_load64, xvd_set_bits64

cdef enum:
    GRANULE_SHIFT = 16           # 64 KiB, as QEMU's bitmaps have it


cdef struct change_map:
    uint64_t *words              # a bit for each granule
    uint64_t granules


cdef inline bint is_marked(const change_map *m, uint64_t granule) noexcept nogil:
    return xvd_load64(&m.words[granule >> 6]) >> (granule & 63) & 1


cdef inline void mark(change_map *m, uint64_t granule) noexcept nogil:
    # Mostly it is: then nothing is written that other CPUs have in their caches.
    if not is_marked(m, granule):
        xvd_set_bits64(&m.words[granule >> 6], <uint64_t>1 << (granule & 63))


cdef inline uint64_t first_granule(uint64_t offset) noexcept nogil:
    return offset >> GRANULE_SHIFT


cdef inline uint64_t end_granule(uint64_t offset, uint64_t length) noexcept nogil:
    """The one behind the last that a range has part in; an empty range has none."""
    if length == 0:
        return offset >> GRANULE_SHIFT
    return ((offset + length - 1) >> GRANULE_SHIFT) + 1


cdef inline void mark_range(change_map *m, uint64_t offset, uint64_t length) noexcept nogil:
    """A range that is within the map; a discard may be of the whole disk, so by words."""
    cdef uint64_t granule = first_granule(offset), end = end_granule(offset, length)
    while granule < end:
        if granule & 63 == 0 and end - granule >= 64:
            xvd_set_bits64(&m.words[granule >> 6], <uint64_t>-1)
            granule += 64
        else:
            mark(m, granule)
            granule += 1


cdef inline bint is_within(const change_map *m, uint64_t offset, uint64_t length) noexcept nogil:
    cdef uint64_t size = m.granules << GRANULE_SHIFT
    return offset <= size and length <= size - offset


cdef class ChangeMap:
    cdef change_map m
    cdef Py_buffer view
    cdef bint has_view
