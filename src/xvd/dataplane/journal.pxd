# SPDX-License-Identifier: Apache-2.0
"""The requests in flight, in memory that may outlive the process that serves them.

A response goes into the next slot, whoever's request lay there: once requests are
answered out of order, the ring itself no longer says which are outstanding, and a successor that
executed everything between rsp_prod and req_prod would answer some twice and some never. So the
private copies of the requests in flight, and the two private indices, live in memory that may
outlive this process. Each change is a few stores, the one that makes it count last; a process
killed between any two of them leaves what `recover` can finish. It guards against the death of a
process, not of the machine: that takes the frontend's memory too.
"""

from libc.stdint cimport int16_t, uint8_t, uint16_t, uint32_t

from xvd.dataplane.abi cimport BLKIF_MAX_ENTRY_SIZE
from xvd.dataplane.c cimport xvd_store_release


cdef enum:
    JOURNAL_MAGIC = 0x316A7678   # "xvj1"

cdef enum entry_state:
    ENTRY_FREE = 0
    ENTRY_TAKEN = 1              # to be executed, and executed again if we die
    ENTRY_ANSWERING = 2          # executed; its response goes to slot `index`

cdef struct journal_entry:
    uint32_t state               # written last when an entry begins or moves on
    uint32_t index               # of the request's slot, then of the response's
    int16_t status
    uint16_t pad
    uint32_t pad2
    uint8_t slot[BLKIF_MAX_ENTRY_SIZE]

cdef struct journal_header:
    uint32_t magic
    uint32_t nr_ents
    uint32_t req_cons
    uint32_t rsp_prod_pvt


cdef inline void mark_taken(journal_header *journal, journal_entry *entry,
                            uint32_t req_cons) noexcept nogil:
    """The entry's slot and index are written: from now on a successor executes it."""
    xvd_store_release(&entry.state, ENTRY_TAKEN)
    xvd_store_release(&journal.req_cons, req_cons)


cdef inline void mark_answering(journal_entry *entry, uint32_t index,
                                int16_t status) noexcept nogil:
    """From now on a successor does not execute it again, but may have to write its response."""
    entry.status = status
    entry.index = index
    xvd_store_release(&entry.state, ENTRY_ANSWERING)


cdef inline void strike(journal_header *journal, journal_entry *entry,
                        uint32_t rsp_prod_pvt) noexcept nogil:
    """The response is in its slot: the index counts it, and the entry is free."""
    xvd_store_release(&journal.rsp_prod_pvt, rsp_prod_pvt)
    xvd_store_release(&entry.state, ENTRY_FREE)
