# SPDX-License-Identifier: Apache-2.0
"""What is counted of requests by kind: how many, how much data, and how long they took.

Latencies are histograms of powers of two, one addition for each request.
"""

from libc.stdint cimport uint32_t, uint64_t

from xvd.dataplane.abi cimport (
    BLKIF_KIND_DISCARD, BLKIF_KIND_FLUSH, BLKIF_KIND_READ, BLKIF_KIND_WRITE, BLKIF_NR_KINDS)

cdef extern from * nogil:
    int __builtin_clzll(unsigned long long x)


cdef enum:
    LATENCY_BUCKETS = 40         # bucket i counts from 2^i ns to below twice that; the last has
                                 # more

cdef struct latencies:
    uint64_t count[BLKIF_NR_KINDS][LATENCY_BUCKETS]

cdef struct kind_counts:
    uint64_t requests[BLKIF_NR_KINDS]
    uint64_t sectors[BLKIF_NR_KINDS]


cdef inline void count_latency(latencies *counts, uint32_t kind, uint64_t ns) noexcept nogil:
    cdef uint32_t bucket = 63 - __builtin_clzll(ns | 1)
    counts.count[kind][min(bucket, <uint32_t>LATENCY_BUCKETS - 1)] += 1


cdef inline void count_kind(kind_counts *counts, uint32_t kind, uint64_t sectors) noexcept nogil:
    counts.requests[kind] += 1
    counts.sectors[kind] += sectors


cdef inline dict kind_figures(const kind_counts *counts):
    """By blkback's names; what a flush or a barrier carries is data that is written."""
    return {
        "rd_req": counts.requests[BLKIF_KIND_READ],
        "wr_req": counts.requests[BLKIF_KIND_WRITE],
        "f_req": counts.requests[BLKIF_KIND_FLUSH],
        "ds_req": counts.requests[BLKIF_KIND_DISCARD],
        "rd_sect": counts.sectors[BLKIF_KIND_READ],
        "wr_sect": counts.sectors[BLKIF_KIND_WRITE] + counts.sectors[BLKIF_KIND_FLUSH],
        "ds_sect": counts.sectors[BLKIF_KIND_DISCARD],
    }


cdef inline dict latency_lists(const latencies *counts):
    """The histograms by name, as lists of LATENCY_BUCKETS counts."""
    return {
        name: [counts.count[kind][i] for i in range(<int>LATENCY_BUCKETS)]
        for kind, name in enumerate(("read", "write", "flush", "discard"))
    }
