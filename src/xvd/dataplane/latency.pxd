# SPDX-License-Identifier: Apache-2.0
# Inline header of dataplane/, for dataplane/back/ and dataplane/front/.
"""What is counted of requests by kind: how many, how much data, and how long they took.

Latencies are histograms of powers of two and sums, two additions for each request.
"""

from libc.stdint cimport uint32_t, uint64_t

from xvd.dataplane.abi cimport BLKIF_NR_KINDS

cdef extern from * nogil:
    int __builtin_clzll(unsigned long long x)


cdef enum:
    LATENCY_BUCKETS = 40         # bucket i counts from 2^i ns to below twice that; the last has
                                 # more

cdef struct latencies:
    uint64_t sum_ns[BLKIF_NR_KINDS]
    uint64_t count[BLKIF_NR_KINDS][LATENCY_BUCKETS]

cdef struct kind_counts:
    uint64_t requests[BLKIF_NR_KINDS]
    uint64_t sectors[BLKIF_NR_KINDS]


cdef inline void count_latency(latencies *counts, uint32_t kind, uint64_t ns) noexcept nogil:
    cdef uint32_t bucket = 63 - __builtin_clzll(ns | 1)
    counts.count[kind][min(bucket, <uint32_t>LATENCY_BUCKETS - 1)] += 1
    counts.sum_ns[kind] += ns


cdef inline void count_kind(kind_counts *counts, uint32_t kind, uint64_t sectors) noexcept nogil:
    counts.requests[kind] += 1
    counts.sectors[kind] += sectors


cdef inline void discount_kind(kind_counts *counts, uint32_t kind, uint64_t sectors) noexcept nogil:
    """It will be counted again."""
    counts.requests[kind] -= 1
    counts.sectors[kind] -= sectors


cdef dict kind_figures(const kind_counts *counts)


cdef dict latency_lists(const latencies *counts)


cdef dict latency_sums(const latencies *counts)
