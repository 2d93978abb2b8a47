# SPDX-License-Identifier: Apache-2.0
"""How long requests took, by kind: a histogram of powers of two, one addition for each request."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from xvd.dataplane.abi cimport BLKIF_OP_DISCARD, BLKIF_OP_READ, BLKIF_OP_WRITE

cdef extern from * nogil:
    int __builtin_clzll(unsigned long long x)


cdef enum:
    LATENCY_BUCKETS = 40         # bucket i counts from 2^i ns to below twice that; the last has more

cdef enum latency_kind:
    LATENCY_READ = 0
    LATENCY_WRITE = 1
    LATENCY_FLUSH = 2            # barriers too
    LATENCY_DISCARD = 3
    LATENCY_KINDS = 4

cdef struct latencies:
    uint64_t count[LATENCY_KINDS][LATENCY_BUCKETS]


cdef inline void count_latency(latencies *counts, uint8_t operation, uint64_t ns) noexcept nogil:
    cdef uint32_t bucket = 63 - __builtin_clzll(ns | 1), kind = LATENCY_FLUSH
    if operation == BLKIF_OP_READ:
        kind = LATENCY_READ
    elif operation == BLKIF_OP_WRITE:
        kind = LATENCY_WRITE
    elif operation == BLKIF_OP_DISCARD:
        kind = LATENCY_DISCARD
    counts.count[kind][min(bucket, <uint32_t>LATENCY_BUCKETS - 1)] += 1


cdef inline dict latency_lists(const latencies *counts):
    """The histograms by name, as lists of LATENCY_BUCKETS counts."""
    return {
        name: [counts.count[kind][i] for i in range(<int>LATENCY_BUCKETS)]
        for kind, name in enumerate(("read", "write", "flush", "discard"))
    }
