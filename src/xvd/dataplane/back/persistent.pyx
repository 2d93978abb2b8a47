# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""The book of persistent grants as a Python object, for its differential test."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t


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

    def let_go(self, uint32_t gref, uint64_t now_ns):
        """A segment is done with a grant that it uses."""
        let_go(&self.book, find(&self.book, gref), now_ns)

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
