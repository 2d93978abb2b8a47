# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""Whether a journal belongs to a ring, and whether what it says is possible.

A journal is believed as a whole or not at all. The one idea: whatever a process that dies leaves,
every request between the two indices has exactly one entry, but for the one that was being taken
and the one that was being answered; anything else was not written by a predecessor on this ring.
"""

from libc.stdint cimport INT32_MAX, uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from xvd.dataplane.abi cimport XEN_PAGE_SIZE, blkif_layouts
from xvd.dataplane.c cimport xvd_store_release
from xvd.dataplane.ring.ring cimport (
    back_ring, check_ring, instance_of, requests_published, responses_published, set_instance)


cdef struct found_entries:
    uint32_t taken               # counted by req_cons
    uint32_t late                # being taken: not counted yet; 0 or 1
    uint32_t unwritten           # being answered: not counted by rsp_prod_pvt yet
    uint32_t written             # being answered, and counted already
    uint32_t impossible


def journal_size(uint32_t nr_ents):
    """Bytes of a journal for a ring of so many entries."""
    return sizeof(journal_header) + nr_ents * sizeof(journal_entry)


def unanswered(const uint8_t[::1] ring):
    """Requests on a ring that have no response yet, by its shared indices."""
    return <uint32_t>(requests_published(&ring[0]) - responses_published(&ring[0]))


def journal_fault(journal, ring, uint32_t nr_ents, int abi):
    """Why a journal cannot be taken up for this ring, in words; an empty text if it can be.

    journal, ring: writable buffers; neither is changed. A journal in which nothing was ever written
    has a fault too.
    """
    cdef uint8_t[::1] memory = journal
    cdef uint8_t[::1] page = ring
    cdef back_ring r
    check_ring(page.shape[0], nr_ents, abi, XEN_PAGE_SIZE)
    if memory.shape[0] == 0:
        return "it is empty"
    r.sring = &page[0]
    r.nr_ents = nr_ents
    r.layout = &blkif_layouts[abi]
    return (<bytes>fault_of(<journal_header *>&memory[0], memory.shape[0], &r)).decode()


cdef void begin_journal(journal_header *journal, back_ring *ring,
                        uint64_t instance) noexcept nogil:
    """Begin anew for a ring that was attached to, under a number that this ring alone has.

    A frontend clears the number's place when it makes a ring (io/ring.h, SHARED_RING_INIT), and
    nobody else writes there: on the next ring of the same gref and port it is not found.
    """
    memset(journal, 0, sizeof(journal_header) + ring.nr_ents * sizeof(journal_entry))
    set_instance(ring.sring, instance)
    journal.nr_ents = ring.nr_ents
    journal.instance = instance
    journal.req_cons, journal.rsp_prod_pvt = ring.req_cons, ring.rsp_prod_pvt
    xvd_store_release(&journal.magic, JOURNAL_MAGIC)


cdef bint is_first(journal_entry *entries, uint32_t at) noexcept nogil:
    """Whether no entry before this one is of the same request."""
    cdef uint32_t i
    for i in range(at):
        if (entries[i].word & KIND_MASK == ENTRY_TAKEN
                and entries[i].index == entries[at].index):
            return False
    return True


cdef void find_entry(const journal_header *journal, journal_entry *entries, uint32_t at,
                     found_entries *found) noexcept nogil:
    """Judge one entry and count it as what it is.

    A request may be as old as it likes: others of its slot were taken and answered meanwhile.
    """
    cdef journal_entry *entry = &entries[at]
    cdef uint32_t taken = seal_taken(entry)
    cdef uint32_t age = journal.req_cons - entry.index
    cdef uint32_t ahead = journal.rsp_prod_pvt - entry.rsp_index
    if entry.word == ENTRY_FREE:
        return
    if entry.word == taken and is_first(entries, at) and age <= INT32_MAX:
        found.taken += age > 0
        found.late += age == 0
    elif entry.word == seal_answer(taken, entry.rsp_index, entry.status) and ahead <= 1:
        found.unwritten += ahead == 0
        found.written += ahead == 1
    else:
        found.impossible += 1


cdef const char *fault_of(journal_header *journal, uint64_t size, back_ring *ring) noexcept nogil:
    """The first reason not to believe a journal, or an empty text."""
    cdef uint32_t nr_ents = ring.nr_ents, outstanding, i
    cdef uint32_t req_prod = requests_published(ring.sring)
    cdef uint32_t rsp_prod = responses_published(ring.sring)
    cdef found_entries found
    memset(&found, 0, sizeof(found))
    if size < sizeof(journal_header) + nr_ents * sizeof(journal_entry):
        return b"it is too short for the ring"
    if journal.magic != JOURNAL_MAGIC:
        return b"it does not begin as a journal does"
    if journal.nr_ents != nr_ents:
        return b"it is of a ring of another size"
    if journal.instance == 0 or journal.instance != instance_of(ring.sring):
        return b"it is of another ring"
    outstanding = journal.req_cons - journal.rsp_prod_pvt
    if outstanding > nr_ents:
        return b"its indices are further apart than the ring is long"
    for i in range(nr_ents):
        find_entry(journal, entries_of(journal), i, &found)
    if found.impossible:
        return b"it has entries that no backend writes"
    if (found.late > 1 or found.unwritten + found.written > 1
            or found.taken + found.unwritten != outstanding):
        return b"its entries are not those between its indices"
    outstanding += found.late
    if (<uint32_t>(req_prod - journal.rsp_prod_pvt) > nr_ents
            or <uint32_t>(req_prod - journal.rsp_prod_pvt) < outstanding
            or <uint32_t>(journal.rsp_prod_pvt - rsp_prod) > nr_ents):
        return b"its indices are not between those of the ring"
    return b""
