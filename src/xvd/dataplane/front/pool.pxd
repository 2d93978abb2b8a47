# SPDX-License-Identifier: Apache-2.0
# Inline header of dataplane/front/.
"""A frontend queue's data pages: one list of free ones, and what each is granted as.

The free list and the pages of each request are chains through one array, so that a request of any
size holds its pages in two numbers. The list is last in, first out: the hot pages stay hot, and the
backend's mappings of the cold ones grow old and are dropped (Linux blkfront, 0a8704a5). A chain
goes back in its order: pages that were neighbours in memory stay neighbours in requests, and a
backend that maps them side by side transfers them as one.

Without persistent grants a page is granted when it is taken and must be free of the peer when it
is given back. With them it stays granted as long as the peer keeps it mapped: whether it does, only
the attempt to end the grant tells.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from xvd.dataplane.c cimport DEBUG_ASSERT
from xvd.dataplane.ports cimport granter_ports


cdef enum:
    NO_PAGE = 0xFFFFFFFF

cdef struct page_pool:
    granter_ports *ports
    uint32_t persistent
    uint32_t nr_free
    uint32_t first, last         # of the free list; NO_PAGE both when it is empty
    uint32_t *next               # of each page: in the free list, or in its request's chain
    uint8_t *granted             # of each page: the peer may map it now
    uint32_t in_place            # pages that operations keep their data in
    uint32_t in_place_max
    uint64_t grants              # made
    uint64_t reused              # found made already
    uint64_t ended


cdef inline void put_before(page_pool *p, uint32_t head, uint32_t tail) noexcept nogil:
    """A chain, counted already, in front of the list."""
    p.next[tail] = p.first
    p.first = head
    if p.last == NO_PAGE:
        p.last = tail


cdef inline void put_last(page_pool *p, uint32_t page) noexcept nogil:
    p.next[page] = NO_PAGE
    if p.last == NO_PAGE:
        p.first = page
    else:
        p.next[p.last] = page
    p.last = page
    p.nr_free += 1


cdef bint open_pool(page_pool *p, granter_ports *ports, bint persistent) noexcept nogil


cdef void close_pool(page_pool *p) noexcept nogil


cdef inline uint8_t *page_data(const page_pool *p, uint32_t page) noexcept nogil:
    return p.ports.base + <size_t>page * p.ports.stride


cdef inline uint32_t take_page(page_pool *p, bint readonly) noexcept nogil:
    """A granted page; only while `nr_free` says there is one.

    A persistent grant is writable whatever it is for at first: the page's next use may be a read.
    """
    cdef uint32_t page = p.first
    DEBUG_ASSERT(p.nr_free > 0)
    p.first = p.next[page]
    if p.first == NO_PAGE:
        p.last = NO_PAGE
    p.nr_free -= 1
    if p.granted[page] and p.persistent:
        p.reused += 1
        return page
    p.ports.grant(p.ports.ctx, page, readonly and not p.persistent)
    p.granted[page] = 1
    p.grants += 1
    return page


cdef inline uint32_t take_chain(page_pool *p, uint32_t count, bint readonly) noexcept nogil:
    """The first `count` free pages, granted; they stay chained as they were in the free list."""
    cdef uint32_t first = p.first, i
    for i in range(count):
        take_page(p, readonly)
    return first


cdef inline bint ends_grant(page_pool *p, uint32_t page) noexcept nogil:
    """Whether the peer has let go of a page, which then is granted no more."""
    if p.persistent and p.ports.lasting or p.ports.revoke(p.ports.ctx, page) != 0:
        return False
    p.granted[page] = 0
    p.ended += 1
    return True


cdef inline bint give_pages(page_pool *p, uint32_t first, uint32_t count) noexcept nogil:
    """The request is over: its chain back to the front of the list. False if the peer holds on to a
    page that it should have let go.

    Such a page does not come back (XSA-396). A persistent one that the peer has let go goes last:
    it costs a grant at its next use.
    """
    cdef uint32_t page = first, head = NO_PAGE, tail = NO_PAGE, following, i
    for i in range(count):
        following = p.next[page]
        if not ends_grant(p, page):
            if not p.persistent:
                return False
        elif p.persistent:
            put_last(p, page)
            page = following
            continue
        if tail == NO_PAGE:
            head = page
        else:
            p.next[tail] = page
        tail = page
        p.nr_free += 1
        page = following
    if tail != NO_PAGE:
        put_before(p, head, tail)
    return True


cdef void end_idle_grants(page_pool *p) noexcept nogil
