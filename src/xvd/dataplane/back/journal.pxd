# SPDX-License-Identifier: Apache-2.0
# Inline header of dataplane/back/.
"""The requests in flight, in memory that may outlive the process that serves them.

A response goes into the next slot, whoever's request lay there: once requests are
answered out of order, the ring itself no longer says which are outstanding, and a successor that
executed everything between rsp_prod and req_prod would answer some twice and some never. So the
private copies of the requests in flight, and the two private indices, live in memory that may
outlive this process. Each change is a few stores, the one that makes it count last; a process
killed between any two of them leaves what a successor can finish. It guards against the death of a
process, not of the machine: that takes the frontend's memory too.

What a successor finds may be anything: a file of another ring, cut short, or with bits turned over.
So the journal carries the number of its ring's instance, which is written on the ring's page too,
and each entry's first word is a seal over the rest of it. journal.pyx has the examination.
"""

from libc.stdint cimport int16_t, uint8_t, uint16_t, uint32_t, uint64_t

from xvd.dataplane.abi cimport (
    BLKIF_MAX_ENTRY_SIZE, BLKIF_MAX_SEGMENTS_PER_REQUEST, BLKIF_OP_FLUSH_DISKCACHE)
from xvd.dataplane.c cimport xvd_store_release
from xvd.dataplane.ring.ring cimport back_ring


cdef enum:
    JOURNAL_MAGIC = 0x326A7678   # "xvj2"
    KIND_MASK = 3                # of an entry's word; what is above is its seal

cdef enum entry_kind:
    ENTRY_FREE = 0               # the whole word is 0
    ENTRY_TAKEN = 1              # to be executed, and executed again if we die
    ENTRY_ANSWERING = 2          # executed; its response goes to slot `rsp_index`

cdef struct journal_entry:
    uint32_t word                # kind and seal; written last when an entry begins or moves on
    uint32_t index               # of the request's slot
    uint32_t rsp_index           # of the response's
    int16_t status
    uint16_t pad
    uint8_t slot[BLKIF_MAX_ENTRY_SIZE]

# As long as an entry, so that neither shares a line of the cache with another.
cdef struct journal_header:
    uint32_t magic
    uint32_t nr_ents
    uint32_t req_cons
    uint32_t rsp_prod_pvt
    uint64_t instance            # of the ring; never 0
    uint8_t pad[104]


cdef inline uint32_t words_of(const uint8_t *slot) noexcept nogil:
    """How many words of a slot mean something: of a read or write with few segments most do not.
    The operation and the number of segments are the first two bytes in every ABI."""
    cdef uint32_t words = BLKIF_MAX_ENTRY_SIZE // 8
    if slot[0] <= BLKIF_OP_FLUSH_DISKCACHE and slot[1] < BLKIF_MAX_SEGMENTS_PER_REQUEST:
        words = 3 + slot[1]
    return words


cdef inline uint32_t seal_taken(const journal_entry *entry) noexcept nogil:
    """The word of an entry that is to be executed. Each step is one-to-one, so a change of one word
    is lost only where the last step cuts the result down: one change in 2^30."""
    cdef const uint64_t *words = <const uint64_t *>entry.slot
    cdef uint64_t mixed = entry.index
    cdef uint32_t i
    for i in range(words_of(entry.slot)):
        mixed = (mixed ^ words[i]) * <uint64_t>0x9E3779B97F4A7C15
    return <uint32_t>(mixed >> 32) & ~<uint32_t>KIND_MASK | ENTRY_TAKEN


cdef inline uint32_t seal_answer(uint32_t taken, uint32_t rsp_index, int16_t status) noexcept nogil:
    """The word that follows `taken` once the answer is known."""
    cdef uint64_t mixed = ((<uint64_t>taken << 32) ^ rsp_index) * <uint64_t>0x9E3779B97F4A7C15
    mixed = (mixed ^ <uint16_t>status) * <uint64_t>0x9E3779B97F4A7C15
    return <uint32_t>(mixed >> 32) & ~<uint32_t>KIND_MASK | ENTRY_ANSWERING


cdef inline void mark_taken(journal_header *journal, journal_entry *entry,
                            uint32_t req_cons) noexcept nogil:
    """The entry's slot and index are written: from now on a successor executes it."""
    xvd_store_release(&entry.word, seal_taken(entry))
    xvd_store_release(&journal.req_cons, req_cons)


cdef inline void mark_answering(journal_entry *entry, uint32_t index,
                                int16_t status) noexcept nogil:
    """From now on a successor does not execute it again, but may have to write its response."""
    entry.status = status
    entry.rsp_index = index
    xvd_store_release(&entry.word, seal_answer(entry.word, index, status))


cdef inline void strike(journal_header *journal, journal_entry *entry,
                        uint32_t rsp_prod_pvt) noexcept nogil:
    """The response is in its slot: the index counts it, and the entry is free."""
    xvd_store_release(&journal.rsp_prod_pvt, rsp_prod_pvt)
    xvd_store_release(&entry.word, ENTRY_FREE)


cdef inline journal_entry *entries_of(journal_header *journal) noexcept nogil:
    return <journal_entry *>(journal + 1)


cdef const char *fault_of(journal_header *journal, uint64_t size, back_ring *ring) noexcept nogil

cdef void begin_journal(journal_header *journal, back_ring *ring,
                        uint64_t instance) noexcept nogil
