# SPDX-License-Identifier: Apache-2.0
# Inline header of machine/, for machine/emulated/ and machine/xen/.
"""Memory of our own in the place of a peer's pages."""

from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap,
    munmap)


cdef inline void replace_pages(void *base, size_t size) noexcept nogil:
    """Let whoever still has these addresses find memory there that is nobody's.

    Where the system has none to give, nothing is there: a late access ends this process then, and
    its successor serves the guest. It would be worse to find a page of the guest's.
    """
    if mmap(base, size, PROT_READ | PROT_WRITE,
            MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == MAP_FAILED:
        munmap(base, size)
