# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""The book of persistent grants: its memory, and as a Python object for its differential test."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free


cdef bint open_book(persistent_grants *book, uint32_t capacity,
                    uint32_t secret) noexcept nogil:
    """Take the memory for at most `capacity` grants (above 0); False if there is none."""
    cdef uint32_t i, size = 16
    while size < 2 * capacity:
        size *= 2
    book.grants = <persistent_grant *>calloc(capacity, sizeof(persistent_grant))
    book.free_list = <uint32_t *>calloc(capacity, sizeof(uint32_t))
    book.table = <uint32_t *>calloc(size, sizeof(uint32_t))
    if not (book.grants and book.free_list and book.table):
        return False
    book.capacity, book.mask, book.secret = capacity, size - 1, secret
    book.oldest = book.newest = NOBODY
    for i in range(size):
        book.table[i] = NOBODY
    for i in range(capacity):
        book.free_list[i] = capacity - 1 - i
    book.nr_free = capacity
    return True


cdef void close_book(persistent_grants *book) noexcept nogil:
    """Give the memory back; also what `open_book` took before it failed."""
    free(book.grants)
    free(book.free_list)
    free(book.table)


cdef class PersistentGrants:
    """The book alone: nothing is mapped. Times in nanoseconds; one thread."""

    cdef persistent_grants book

    def __init__(self, uint32_t capacity, *, uint32_t limit, uint64_t idle_ns=0, uint32_t secret=0):
        if self.book.grants != NULL or not open_book(&self.book, max(1, capacity), secret):
            raise MemoryError(f"no memory for {capacity} grants")
        self.book.limit, self.book.idle_ns = limit, idle_ns

    def __dealloc__(self):
        close_book(&self.book)

    def use(self, uint32_t gref):
        """A segment uses a grant: True if it is kept now, False if it is over the limit."""
        cdef uint32_t number = find(&self.book, gref)
        if number != NOBODY:
            hold(&self.book, number)
            return True
        number = keep(&self.book, gref)
        if number == NOBODY:
            return False
        self.book.grants[number].page = <uint8_t *>1
        return True

    def release(self, uint32_t gref, uint64_t now_ns):
        """A segment is done with a grant that it uses."""
        release_grant(&self.book, find(&self.book, gref), now_ns)

    def set_limit(self, uint32_t limit):
        """Change how many may be kept."""
        self.book.limit = limit

    def purge(self, uint64_t now_ns, *, bint everything=False):
        """Scan, and strike out what is due; the references in order."""
        cdef persistent_grant *g
        scan(&self.book, now_ns)
        purged = []
        while True:
            g = next_to_purge(&self.book, now_ns, everything)
            if g == NULL:
                return purged
            purged.append(g.gref)

    def __contains__(self, uint32_t gref):
        return find(&self.book, gref) != NOBODY

    def __len__(self):
        return self.book.count
