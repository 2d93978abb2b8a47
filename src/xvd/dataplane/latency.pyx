# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""The figures of latency.pxd in Python's terms."""

from xvd.dataplane.abi cimport (
    BLKIF_KIND_DISCARD, BLKIF_KIND_FLUSH, BLKIF_KIND_READ, BLKIF_KIND_WRITE)


cdef dict kind_figures(const kind_counts *counts):
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


_KINDS = ("read", "write", "flush", "discard")


cdef dict latency_lists(const latencies *counts):
    """The histograms by name, as lists of LATENCY_BUCKETS counts."""
    return {
        name: [counts.count[kind][i] for i in range(<int>LATENCY_BUCKETS)]
        for kind, name in enumerate(_KINDS)
    }


cdef dict latency_sums(const latencies *counts):
    """By name, the nanoseconds of all that the histograms count."""
    return {name: counts.sum_ns[kind] for kind, name in enumerate(_KINDS)}
