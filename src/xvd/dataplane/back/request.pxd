# SPDX-License-Identifier: Apache-2.0
# Inline header of dataplane/back/.
"""One request taken off the ring: parsed from its private copy, and judged.

The order of the checks is that of blkif/validate.py, and a differential test holds it there. A
number of the frontend's indexes nothing and bounds no loop before it has been checked.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from xvd.dataplane.abi cimport (
    BLKIF_DATA_FROM_DISK, BLKIF_DISCARD_SECURE, BLKIF_FLAG_DIVISIBLE,
    BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST, BLKIF_MAX_SEGMENTS_PER_REQUEST, BLKIF_OFFER_SECURE,
    BLKIF_OP_INDIRECT, BLKIF_SECTORS_PER_PAGE, BLKIF_SHAPE_DISCARD, BLKIF_SHAPE_INDIRECT,
    BLKIF_SHAPE_NONE, BLKIF_SHAPE_RW, REFUSAL_INDIRECT_OPERATION, REFUSAL_MISALIGNED, REFUSAL_NONE,
    REFUSAL_NOT_OFFERED, REFUSAL_NO_SEGMENTS, REFUSAL_OUT_OF_RANGE, REFUSAL_READ_ONLY,
    REFUSAL_SECURE_NOT_OFFERED, REFUSAL_SEGMENT_ORDER, REFUSAL_SEGMENT_PAST_PAGE,
    REFUSAL_TOO_MANY_SEGMENTS, REFUSAL_UNKNOWN_OPERATION, blkif_layout, blkif_operations)
from xvd.dataplane.c cimport xvd_get16, xvd_get32, xvd_get64


cdef struct request:
    uint64_t id
    uint64_t sector_number
    uint64_t nr_sectors          # of the data, or of the discard
    uint16_t nr_segments
    uint8_t operation            # of an indirect request the inner one, which answers it
    uint8_t flag                 # a discard's
    uint8_t indirect             # 1: the segments lie in the pages of `indirect_grefs`
    uint32_t indirect_grefs[BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST]
    uint32_t *grefs              # the segments; room for `nr_segments` of a legal request
    uint8_t *first_sect
    uint8_t *last_sect

cdef struct request_limits:
    uint64_t capacity            # 512-byte sectors
    uint32_t block_sectors       # logical block size / 512
    uint32_t wire_sector         # what this frontend counts in: 512-byte sectors to one of its own
    uint32_t read_only
    uint32_t offered             # bit 1 << operation for each that the backend advertised, and
                                 # BLKIF_OFFER_SECURE
    uint32_t indirect_max        # segments of an indirect request


cdef inline bint reads_disk(const request *rq) noexcept nogil:
    """Whether its data goes to the frontend."""
    return blkif_operations[rq.operation].data == BLKIF_DATA_FROM_DISK


cdef inline bint is_discard(const request *rq) noexcept nogil:
    return blkif_operations[rq.operation].shape == BLKIF_SHAPE_DISCARD


cdef inline bint is_divisible(const request *rq) noexcept nogil:
    return blkif_operations[rq.operation].flags & BLKIF_FLAG_DIVISIBLE


cdef inline void parse_segments(const uint8_t *segment, const blkif_layout *at, uint32_t count,
                                request *rq) noexcept nogil:
    """Read `count` segments of a private copy, of a slot or of indirect pages."""
    cdef uint32_t i
    for i in range(count):
        rq.grefs[i] = xvd_get32(segment + at.segment_gref)
        rq.first_sect[i] = segment[at.segment_first_sect]
        rq.last_sect[i] = segment[at.segment_last_sect]
        segment += at.segment_size


cdef inline void parse_indirect(const uint8_t *slot, const blkif_layout *at,
                                request *rq) noexcept nogil:
    cdef uint32_t i
    rq.indirect = 1
    rq.operation = slot[at.indirect_op]
    rq.id = xvd_get64(slot + at.indirect_id)
    rq.nr_segments = xvd_get16(slot + at.indirect_nr_segments)
    rq.sector_number = xvd_get64(slot + at.indirect_sector_number)
    for i in range(BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST):
        rq.indirect_grefs[i] = xvd_get32(slot + at.indirect_grefs + 4 * i)


cdef inline void parse(const uint8_t *slot, const blkif_layout *at, request *rq) noexcept nogil:
    """Read a private copy of a slot. Of an unknown operation only the id is believed.

    `rq.grefs` and the other two have room for the segments of a slot.
    """
    cdef uint32_t shape = blkif_operations[slot[0]].shape
    rq.operation = slot[0]
    rq.indirect = 0
    rq.nr_segments = 0
    rq.sector_number = 0
    rq.nr_sectors = 0
    rq.flag = 0
    if shape == BLKIF_SHAPE_RW:
        rq.id = xvd_get64(slot + at.rw_id)
        rq.nr_segments = slot[at.rw_nr_segments]
        rq.sector_number = xvd_get64(slot + at.rw_sector_number)
        parse_segments(slot + at.rw_seg, at,
                       min(rq.nr_segments, <uint32_t>BLKIF_MAX_SEGMENTS_PER_REQUEST), rq)
    elif shape == BLKIF_SHAPE_INDIRECT:
        parse_indirect(slot, at, rq)
    elif shape == BLKIF_SHAPE_DISCARD:
        rq.id = xvd_get64(slot + at.discard_id)
        rq.flag = slot[at.discard_flag]
        rq.sector_number = xvd_get64(slot + at.discard_sector_number)
        rq.nr_sectors = xvd_get64(slot + at.discard_nr_sectors)
    else:
        rq.id = xvd_get64(slot + at.other_id)


cdef inline int check_segments(request *rq, uint32_t unit) noexcept nogil:
    """Order and page bound of each, and their sum; alignment is judged after the range.

    From here on they are in sectors of 512 bytes.
    """
    cdef uint32_t i
    for i in range(rq.nr_segments):
        if rq.first_sect[i] > rq.last_sect[i]:
            return REFUSAL_SEGMENT_ORDER
        if (<uint32_t>rq.last_sect[i] + 1) * unit > BLKIF_SECTORS_PER_PAGE:
            return REFUSAL_SEGMENT_PAST_PAGE
        if unit > 1:
            rq.first_sect[i] = <uint8_t>(rq.first_sect[i] * unit)
            rq.last_sect[i] = <uint8_t>((rq.last_sect[i] + 1) * unit - 1)
        rq.nr_sectors += rq.last_sect[i] - rq.first_sect[i] + 1
    return REFUSAL_NONE


cdef inline bint count_in_512(request *rq, const request_limits *limits) noexcept nogil:
    """Turn a range that the frontend counts in larger units into sectors of 512 bytes; False if it
    ends behind the disk in any case, for then the product could wrap."""
    cdef uint64_t most = limits.capacity // limits.wire_sector
    cdef bint discards = is_discard(rq)
    if rq.sector_number > most or discards and rq.nr_sectors > most:
        return False
    rq.sector_number *= limits.wire_sector
    if discards:
        rq.nr_sectors *= limits.wire_sector
    return True


cdef inline bint misaligned(const request *rq, const request_limits *limits) noexcept nogil:
    cdef uint32_t i, block = limits.block_sectors
    if rq.sector_number % block:
        return True
    for i in range(rq.nr_segments):
        if (rq.last_sect[i] - rq.first_sect[i] + 1) % block:
            return True
    return False


cdef inline int check_slot(const request *rq, const request_limits *limits) noexcept nogil:
    """What the slot alone tells: checks 1 to 7 of blkif/validate.py."""
    cdef uint32_t wire = BLKIF_OP_INDIRECT if rq.indirect else rq.operation
    cdef uint32_t shape = blkif_operations[wire].shape
    cdef uint32_t most = limits.indirect_max if rq.indirect else BLKIF_MAX_SEGMENTS_PER_REQUEST
    if shape == BLKIF_SHAPE_NONE:
        return REFUSAL_UNKNOWN_OPERATION
    if not limits.offered & (<uint32_t>1 << wire):
        return REFUSAL_NOT_OFFERED
    if shape == BLKIF_SHAPE_DISCARD:
        if rq.flag & BLKIF_DISCARD_SECURE and not limits.offered & BLKIF_OFFER_SECURE:
            return REFUSAL_SECURE_NOT_OFFERED
        return REFUSAL_READ_ONLY if limits.read_only else REFUSAL_NONE
    if rq.indirect and not is_divisible(rq):
        return REFUSAL_INDIRECT_OPERATION
    if rq.nr_segments == 0 and is_divisible(rq):
        return REFUSAL_NO_SEGMENTS
    if rq.nr_segments > most:
        return REFUSAL_TOO_MANY_SEGMENTS
    if limits.read_only and rq.nr_segments > 0 and not reads_disk(rq):
        return REFUSAL_READ_ONLY
    return REFUSAL_NONE


cdef inline int check_data(request *rq, const request_limits *limits) noexcept nogil:
    """What the segments tell, of an indirect request once they are copied: checks 8 to 10.

    Fills in `nr_sectors`. To be called once for a request that was parsed.
    """
    cdef int refusal = check_segments(rq, limits.wire_sector)
    if refusal != REFUSAL_NONE:
        return refusal
    if rq.nr_segments == 0 and not is_discard(rq):
        return REFUSAL_NONE
    if limits.wire_sector > 1 and not count_in_512(rq, limits):
        return REFUSAL_OUT_OF_RANGE
    # By subtraction: a sum could wrap past 2^64 and look small.
    if rq.sector_number > limits.capacity or rq.nr_sectors > limits.capacity - rq.sector_number:
        return REFUSAL_OUT_OF_RANGE
    if limits.block_sectors > 1 and not is_discard(rq) and misaligned(rq, limits):
        return REFUSAL_MISALIGNED
    return REFUSAL_NONE


cdef inline int validate(request *rq, const request_limits *limits) noexcept nogil:
    """The first refusal in the order of blkif/validate.py; of an indirect request, before its
    segments are known."""
    cdef int refusal = check_slot(rq, limits)
    if refusal != REFUSAL_NONE or rq.indirect:
        return refusal
    return check_data(rq, limits)
