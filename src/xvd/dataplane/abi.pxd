# SPDX-License-Identifier: Apache-2.0
"""Declarations of the generated header; blkif/abi.py and blkif/validate.py say what each means."""

from libc.stdint cimport int16_t, uint16_t, uint32_t


cdef extern from "abi_gen.h" nogil:
    enum:
        BLKIF_OP_READ
        BLKIF_OP_WRITE
        BLKIF_OP_WRITE_BARRIER
        BLKIF_OP_FLUSH_DISKCACHE
        BLKIF_OP_DISCARD
        BLKIF_OP_INDIRECT
        BLKIF_RSP_OKAY
        BLKIF_RSP_ERROR
        BLKIF_RSP_EOPNOTSUPP
        BLKIF_DISCARD_SECURE
        BLKIF_PAGE_SIZE
        BLKIF_SECTOR_SIZE
        BLKIF_SECTORS_PER_PAGE
        BLKIF_MAX_SEGMENTS_PER_REQUEST
        BLKIF_SEGMENTS_PER_INDIRECT_PAGE
        BLKIF_MAX_INDIRECT_SEGMENTS
        BLKIF_MAX_ENTRY_SIZE
        BLKIF_RING_HEADER
        BLKIF_NR_ABI
        SRING_REQ_PROD
        SRING_REQ_EVENT
        SRING_RSP_PROD
        SRING_RSP_EVENT
        SRING_INSTANCE

    enum:
        REFUSAL_NONE
        REFUSAL_UNKNOWN_OPERATION
        REFUSAL_NOT_OFFERED
        REFUSAL_SECURE_NOT_OFFERED
        REFUSAL_INDIRECT_OPERATION
        REFUSAL_NO_SEGMENTS
        REFUSAL_TOO_MANY_SEGMENTS
        REFUSAL_READ_ONLY
        REFUSAL_SEGMENT_ORDER
        REFUSAL_SEGMENT_PAST_PAGE
        REFUSAL_OUT_OF_RANGE
        REFUSAL_MISALIGNED
        REFUSAL_BAD_GRANT
        REFUSAL_COUNT

    enum:
        BREACH_NONE
        BREACH_RESPONSE_OVERFLOW
        BREACH_UNKNOWN_ID
        BREACH_NOT_IN_FLIGHT
        BREACH_WRONG_OPERATION
        BREACH_GRANT_STILL_MAPPED
        BREACH_COUNT

    struct blkif_layout:
        uint16_t entry_size
        uint16_t rw_operation, rw_nr_segments, rw_handle, rw_id, rw_sector_number, rw_seg
        uint16_t discard_flag, discard_handle, discard_id, discard_sector_number
        uint16_t discard_nr_sectors
        uint16_t indirect_op, indirect_nr_segments, indirect_id, indirect_sector_number
        uint16_t indirect_handle, indirect_grefs
        uint16_t other_id
        uint16_t response_id, response_operation, response_status, response_size
        uint16_t segment_size, segment_gref, segment_first_sect, segment_last_sect

    const blkif_layout blkif_layouts[]
    const int16_t blkif_refusal_status[]
    const char *const blkif_refusal_names[]
    const char *const blkif_breach_names[]
