# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""The compiled parser and validator as a Python function, for the differential tests."""

from libc.string cimport memcpy, memset

from xvd.dataplane.abi cimport BLKIF_MAX_ENTRY_SIZE, BLKIF_NR_ABI, blkif_layouts

from xvd.errors import LocalProtocolError


def judge(const uint8_t[::1] slot, int abi, *, uint64_t capacity, uint32_t logical_sectors=1,
          bint read_only=False, uint32_t offered=0x3):
    """Parse a slot and judge it: (refusal, operation, id).

    `offered`: bit ``1 << operation`` for each operation advertised, bit 16 for secure discard.
    """
    cdef uint8_t copy[BLKIF_MAX_ENTRY_SIZE]
    cdef request rq
    cdef request_limits limits
    if not 0 <= abi < BLKIF_NR_ABI or slot.shape[0] > BLKIF_MAX_ENTRY_SIZE:
        raise LocalProtocolError(f"{slot.shape[0]} bytes are no slot of ABI {abi}")
    memset(copy, 0, BLKIF_MAX_ENTRY_SIZE)
    memcpy(copy, &slot[0], slot.shape[0])
    limits.capacity, limits.logical_sectors = capacity, logical_sectors
    limits.read_only, limits.offered = read_only, offered
    parse(copy, &blkif_layouts[abi], &rq)
    return validate(&rq, &limits), rq.operation, rq.id
