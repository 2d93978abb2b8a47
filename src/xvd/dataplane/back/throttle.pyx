# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""Limits that several queues share, as a Python object; throttle.pxd says how they work."""

from libc.stdint cimport uint32_t, uint64_t

from xvd.dataplane.abi cimport BLKIF_NR_KINDS
from xvd.dataplane.c cimport monotonic_ns, xvd_store64

from xvd.errors import LocalProtocolError


cdef class Throttle:
    """Token buckets; each queue that was given them (`BackendQueue.set_throttles`) goes by them."""

    def configure(self, buckets, *, uint64_t request_bytes=0, now_ns=None):
        """Replace the limits by these: at most 12 `Bucket`s, or none. Any thread.

        Every queue that has it is to be told (`BackendQueue.set_throttles`), or what it was waiting
        for by the old limits holds it up. A bucket that was in use begins without its burst, so
        that nobody gets more by changing limits often. request_bytes: a request of more bytes
        counts as several; 0: as one. now_ns: the time, for tests and the simulator.
        """
        cdef uint32_t i, kind
        cdef uint32_t[4] active = [0, 0, 0, 0]
        if len(buckets) > THROTTLE_BUCKETS:
            raise LocalProtocolError(f"there are {THROTTLE_BUCKETS} buckets, not {len(buckets)}")
        cdef uint64_t now = monotonic_ns() if now_ns is None else now_ns
        for i, row in enumerate(buckets):
            self.t.buckets[i].bytes = row.bytes
            self.t.buckets[i].lease = row.lease
            self.t.buckets[i].lease_ns = row.lease * 10**9 // row.rate
            self.t.buckets[i].slack_ns = row.slack_ns
            if self.used >> i & 1:
                xvd_store64(&self.t.buckets[i].next_ns, now)
            for kind in row.kinds:
                active[kind] |= <uint32_t>1 << i
        self.used |= (1 << len(buckets)) - 1
        self.t.request_bytes = request_bytes
        for kind in range(<uint32_t>BLKIF_NR_KINDS):
            self.t.active[kind] = active[kind]
