# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""The pool's memory, and what is done with all of its pages at once."""

from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport calloc, free


cdef bint open_pool(page_pool *p, granter_ports *ports, bint persistent) noexcept nogil:
    """Take over all pages of `ports`, none of them granted; False without memory."""
    cdef uint32_t page
    p.ports = ports
    p.persistent = persistent
    p.first = p.last = NO_PAGE
    p.next = <uint32_t *>calloc(ports.count, sizeof(uint32_t))
    p.granted = <uint8_t *>calloc(ports.count, 1)
    if p.next == NULL or p.granted == NULL:
        return False
    for page in range(ports.count):
        # A peer that is in such haste that it has one mapped already is found out at its first use.
        p.granted[page] = ports.lasting or ports.revoke(ports.ctx, page) != 0
        put_last(p, page)
    return True


cdef void close_pool(page_pool *p) noexcept nogil:
    free(p.next)
    free(p.granted)
    p.next = NULL
    p.granted = NULL


cdef void end_idle_grants(page_pool *p) noexcept nogil:
    """End the grants of free pages that the peer has let go of meanwhile (Linux 4b422cb9).

    A backend drops what it has not used for long, and would otherwise leave us with references that
    nobody maps and that nobody else may have.
    """
    cdef uint32_t page = p.first
    while page != NO_PAGE:
        if p.granted[page] and not p.ports.lasting and p.ports.revoke(p.ports.ctx, page) == 0:
            p.granted[page] = 0
            p.ended += 1
        page = p.next[page]
