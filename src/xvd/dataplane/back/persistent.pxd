# SPDX-License-Identifier: Apache-2.0
# Inline header of dataplane/back/.
"""Persistent grants: which pages of the frontend's stay mapped between requests (Linux 0a8704a5).

Unmapping a page takes it from every CPU that may know of it, which costs more than most requests. A
frontend that offers it uses the same grants again and again, so they are mapped once and kept. This
file is the book of what is kept; it maps nothing itself.

A table finds a grant by its reference: open addressing, linear probing, half empty at most, and a
secret in the hash, because the references are the frontend's to choose. Those that no request uses
form a list by last use, so that what is purged is always at one end. No step takes longer for a
larger book, and none allocates.
"""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from xvd.dataplane.c cimport DEBUG_ASSERT


cdef enum:
    LRU_INTERVAL_NS = 100000000  # blkback's LRU_INTERVAL: how often it is looked for what to purge
    LRU_PERCENT_CLEAN = 5        # of the limit, when the limit was too small (Linux 3f3aad5e)
    NOBODY = 0x7FFFFFFF          # no number of a grant

cdef struct persistent_grant:
    uint8_t *page                # where it is mapped; NULL before, or when it could not be
    uint64_t handle              # what unmapping needs
    uint64_t used_ns             # when the last request let it go
    uint32_t gref
    int32_t status               # of mapping it
    uint32_t users               # requests that use it now, once for each segment
    uint32_t older, newer        # neighbours among those without users

cdef struct persistent_grants:
    persistent_grant *grants
    uint32_t capacity
    uint32_t *table              # a number of `grants`, or NOBODY
    uint32_t mask
    uint32_t secret
    uint32_t *free_list
    uint32_t nr_free
    uint32_t count
    uint32_t limit               # most that are kept; may change at any time, and be below `count`
    uint64_t idle_ns             # purged after so long without a user; 0: never
    uint32_t oldest, newest      # of those without users
    uint32_t overflowed          # 1: a grant was not kept because of the limit
    uint32_t to_purge            # of the present purge, besides those that were idle too long
    uint64_t next_scan_ns


cdef inline uint32_t hash_of(const persistent_grants *book, uint32_t gref) noexcept nogil:
    """Murmur's finalizer: every bit of the reference and of the secret reaches every bit."""
    cdef uint32_t h = gref ^ book.secret
    h = (h ^ (h >> 16)) * <uint32_t>0x85EBCA6B
    h = (h ^ (h >> 13)) * <uint32_t>0xC2B2AE35
    return (h ^ (h >> 16)) & book.mask


cdef bint open_book(persistent_grants *book, uint32_t capacity,
                    uint32_t secret) noexcept nogil


cdef void close_book(persistent_grants *book) noexcept nogil


cdef inline uint32_t find(const persistent_grants *book, uint32_t gref) noexcept nogil:
    """The number of a grant that is kept, or NOBODY."""
    cdef uint32_t at = hash_of(book, gref)
    while book.table[at] != NOBODY:
        if book.grants[book.table[at]].gref == gref:
            return book.table[at]
        at = (at + 1) & book.mask
    return NOBODY


cdef inline void unlink(persistent_grants *book, persistent_grant *g) noexcept nogil:
    """Out of the list of those without users."""
    if g.older != NOBODY:
        book.grants[g.older].newer = g.newer
    else:
        book.oldest = g.newer
    if g.newer != NOBODY:
        book.grants[g.newer].older = g.older
    else:
        book.newest = g.older


cdef inline void hold(persistent_grants *book, uint32_t number) noexcept nogil:
    """One more user: it is not purged before `release_grant`."""
    cdef persistent_grant *g = &book.grants[number]
    if g.users == 0:
        unlink(book, g)
    g.users += 1


cdef inline uint32_t keep(persistent_grants *book, uint32_t gref) noexcept nogil:
    """Begin to keep a grant that is not in the book, with one user; it is to be mapped next.

    NOBODY if there are as many as the limit allows.
    """
    cdef uint32_t number, at
    if book.count >= book.limit or book.nr_free == 0:
        book.overflowed = 1
        return NOBODY
    book.nr_free -= 1
    number = book.free_list[book.nr_free]
    book.grants[number].gref = gref
    book.grants[number].users = 1
    book.grants[number].page = NULL
    at = hash_of(book, gref)
    while book.table[at] != NOBODY:
        at = (at + 1) & book.mask
    book.table[at] = number
    book.count += 1
    return number


cdef inline void strike_out(persistent_grants *book, uint32_t number) noexcept nogil:
    """Forget a grant without users that is not in the list of those either.

    Whoever was pushed on by it in the table moves back: no probe ever meets a gap.
    """
    cdef uint32_t hole = hash_of(book, book.grants[number].gref), at, home
    while book.table[hole] != number:
        hole = (hole + 1) & book.mask
    at = hole
    while True:
        at = (at + 1) & book.mask
        if book.table[at] == NOBODY:
            break
        home = hash_of(book, book.grants[book.table[at]].gref)
        if ((at - home) & book.mask) >= ((at - hole) & book.mask):
            book.table[hole] = book.table[at]
            hole = at
    book.table[hole] = NOBODY
    book.free_list[book.nr_free] = number
    book.nr_free += 1
    book.count -= 1


cdef inline void release_grant(persistent_grants *book, uint32_t number,
                               uint64_t now_ns) noexcept nogil:
    """One user less. Without any it is the last to be purged; one never mapped is forgotten."""
    cdef persistent_grant *g = &book.grants[number]
    DEBUG_ASSERT(g.users > 0)
    g.users -= 1
    if g.users:
        return
    if g.page == NULL:
        strike_out(book, number)
        return
    g.used_ns = now_ns
    g.older, g.newer = book.newest, NOBODY
    if book.newest != NOBODY:
        book.grants[book.newest].newer = number
    else:
        book.oldest = number
    book.newest = number


cdef inline void scan(persistent_grants *book, uint64_t now_ns) noexcept nogil:
    """Every 100 ms, decide how many to purge besides the idle ones, as blkback does: none, but if
    the limit was too small a twentieth of it and what is over, for those that are used more."""
    if now_ns < book.next_scan_ns or book.to_purge:
        return
    book.next_scan_ns = now_ns + LRU_INTERVAL_NS
    if book.count > book.limit or (book.overflowed and book.count == book.limit):
        book.to_purge = min(book.count, book.limit * LRU_PERCENT_CLEAN // 100
                                        + book.count - book.limit)
    book.overflowed = 0


cdef inline bint idle_too_long(const persistent_grants *book, const persistent_grant *g,
                               uint64_t now_ns) noexcept nogil:
    return book.idle_ns != 0 and now_ns - g.used_ns >= book.idle_ns


cdef inline persistent_grant *next_to_purge(persistent_grants *book, uint64_t now_ns,
                                            bint all_of_them) noexcept nogil:
    """Strike out the next that is to be unmapped, the longest unused first; NULL if none is.

    What is returned stays as it was until something else is kept.
    """
    cdef uint32_t number = book.oldest
    cdef persistent_grant *g
    if number == NOBODY:
        book.to_purge = 0        # the rest is in use: looked at again by the next scan
        return NULL
    g = &book.grants[number]
    if not (all_of_them or book.to_purge or idle_too_long(book, g, now_ns)):
        return NULL
    if book.to_purge:
        book.to_purge -= 1
    unlink(book, g)
    strike_out(book, number)
    return g
