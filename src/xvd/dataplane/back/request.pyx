# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""The compiled parser and validator as a Python function, for the differential tests."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from xvd.dataplane.abi cimport (
    BLKIF_MAX_ENTRY_SIZE, BLKIF_MAX_INDIRECT_SEGMENTS, BLKIF_NR_ABI, REFUSAL_NONE, blkif_layouts)

from xvd.errors import LocalProtocolError


def judge(const uint8_t[::1] slot, int abi, *, uint64_t capacity, uint32_t block_sectors=1,
          uint32_t wire_sector=1, bint read_only=False, uint32_t offered=0x3,
          uint32_t indirect_max=0,
          const uint8_t[::1] pages=None):
    """Parse a slot and judge it: (refusal, operation of the answer, id).

    `offered`: bit ``1 << operation`` for each operation advertised, bit 16 for secure discard.
    `pages`: what the indirect pages hold; without them an indirect request is judged by its slot.
    """
    cdef uint8_t copy[BLKIF_MAX_ENTRY_SIZE]
    cdef uint32_t grefs[BLKIF_MAX_INDIRECT_SEGMENTS]
    cdef uint8_t first_sect[BLKIF_MAX_INDIRECT_SEGMENTS]
    cdef uint8_t last_sect[BLKIF_MAX_INDIRECT_SEGMENTS]
    cdef request rq
    cdef request_limits limits
    if not 0 <= abi < BLKIF_NR_ABI or slot.shape[0] > BLKIF_MAX_ENTRY_SIZE:
        raise LocalProtocolError(f"{slot.shape[0]} bytes are no slot of ABI {abi}")
    if indirect_max > BLKIF_MAX_INDIRECT_SEGMENTS:
        raise LocalProtocolError(f"no request has {indirect_max} segments")
    memset(copy, 0, BLKIF_MAX_ENTRY_SIZE)
    memcpy(copy, &slot[0], slot.shape[0])
    limits.capacity, limits.block_sectors = capacity, block_sectors
    limits.wire_sector = wire_sector
    limits.read_only, limits.offered, limits.indirect_max = read_only, offered, indirect_max
    rq.grefs, rq.first_sect, rq.last_sect = grefs, first_sect, last_sect
    parse(copy, &blkif_layouts[abi], &rq)
    refusal = validate(&rq, &limits)
    if refusal == REFUSAL_NONE and rq.indirect and pages is not None:
        if pages.shape[0] < rq.nr_segments * blkif_layouts[abi].segment_size:
            raise LocalProtocolError(f"{rq.nr_segments} segments do not fit in {pages.shape[0]} "
                                     "bytes")
        parse_segments(&pages[0], &blkif_layouts[abi], rq.nr_segments, &rq)
        refusal = check_data(&rq, &limits)
    return refusal, rq.operation, rq.id
