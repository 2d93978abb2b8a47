# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""Our own pages on real Xen: allocated and granted through /dev/xen/gntalloc.

The device grants a page, read-write, when it allocates it, and ends the grant when it frees the
page: there is no taking back in between. So granting and revoking do nothing here, and the peer can
read and change any of these pages for as long as they are not closed. Only data on its way to and
from that same peer may lie in them; it is copied once and not read again.
"""

from cpython.buffer cimport PyBUF_WRITE
from cpython.exc cimport PyErr_SetFromErrno
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport _SC_PAGESIZE, close, sysconf

from xvd.dataplane.abi cimport GNTST_GENERAL_ERROR, GNTST_NO_SPACE, XEN_PAGE_SIZE
from xvd.dataplane.ports cimport granter_ports, wrap
from xvd.machine.xen.devices cimport (
    XVD_GNTALLOC_ALLOC, XVD_GNTALLOC_DEALLOC, ioctl, xvd_alloc_grants, xvd_unmap_grants)

import os

from xvd.errors import GrantError

DEVICE = "/dev/xen/gntalloc"

cdef uint32_t PAGES_MAX = 1 << 20

# A grant takes a whole page of the kernel; the first 4096 bytes of it are the peer's as well.
cdef uint32_t page_size = <uint32_t>sysconf(_SC_PAGESIZE)


cdef void grant(void *ctx, uint32_t page, uint32_t readonly) noexcept nogil:
    """Granted already; a read-only one stays writable for the peer, see above."""


cdef int revoke(void *ctx, uint32_t page) noexcept nogil:
    return 0


cdef void give_back(xvd_alloc_grants *taken, uint8_t *base, int fd) noexcept nogil:
    cdef xvd_unmap_grants request
    if base != NULL:
        munmap(base, <size_t>taken.count * page_size)
        request.index = taken.index
        request.count = taken.count
        request.pad = 0
        ioctl(fd, XVD_GNTALLOC_DEALLOC, &request)
    if fd >= 0:
        close(fd)


cdef class XenSharedPages:
    """`SharedPages`; one thread at a time.

    Raises `GrantError`, having taken nothing, when the device is not to be had or its limit is
    reached (1024 pages for the whole domain unless the module's parameter says otherwise).
    """

    cdef granter_ports table
    cdef xvd_alloc_grants *request
    cdef int fd
    cdef readonly list grefs
    cdef object __weakref__

    def __cinit__(self, uint32_t peer, count):
        self.fd = -1
        if not 0 < count <= PAGES_MAX:
            raise GrantError(f"{count} pages cannot be shared: at least one page and at most "
                             f"{PAGES_MAX}", GNTST_GENERAL_ERROR)
        self.request = <xvd_alloc_grants *>calloc(
            1, sizeof(xvd_alloc_grants) + <size_t>count * sizeof(uint32_t))
        if self.request == NULL:
            raise MemoryError
        self.request.domid = peer
        self.request.flags = 1
        self.request.count = count
        try:
            self.allocate()
        except OSError as error:
            self.close()
            raise GrantError(
                f"cannot share {count} pages with domain {peer}: {error.strerror}; on a Xen domain,"
                " as root: modprobe xen-gntalloc, and raise its parameter limit if pages run out",
                GNTST_NO_SPACE) from None
        self.grefs = [self.request.grefs[i] for i in range(self.request.count)]
        self.table.ctx = NULL
        self.table.grefs = self.request.grefs
        self.table.count = self.request.count
        self.table.stride = page_size
        self.table.grant = grant
        self.table.revoke = revoke
        self.table.lasting = 1

    cdef allocate(self):
        cdef size_t size = <size_t>self.request.count * page_size
        cdef void *base
        self.fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        if ioctl(self.fd, XVD_GNTALLOC_ALLOC, self.request) < 0:
            PyErr_SetFromErrno(OSError)
        base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, self.fd, self.request.index)
        if base == MAP_FAILED:
            PyErr_SetFromErrno(OSError)
        self.table.base = <uint8_t *>base
        memset(base, 0, size)

    def __dealloc__(self):
        give_back(self.request, self.table.base, self.fd)
        free(self.request)

    @property
    def count(self):
        """Number of pages."""
        return self.request.count

    @property
    def stride(self):
        """Bytes from one page to the next."""
        return page_size

    @property
    def view(self):
        """The pages as writable bytes; not to be used after `close`."""
        if self.table.base == NULL:
            raise ValueError("the pages were given back")
        size = <Py_ssize_t>(self.request.count - 1) * page_size + XEN_PAGE_SIZE
        return PyMemoryView_FromMemory(<char *>self.table.base, size, PyBUF_WRITE)

    @property
    def ports(self):
        """Capsule ``xvd.granter_ports``."""
        return wrap(&self.table, "xvd.granter_ports")

    def grant(self, uint32_t page, *, bint readonly=False):
        """Nothing: a page is granted, read-write, as long as it is ours."""
        self.check(page)

    def revoke(self, uint32_t page):
        """Nothing, and True: a page is granted as long as it is ours."""
        self.check(page)
        return True

    cdef check(self, uint32_t page):
        if page >= self.request.count:
            raise IndexError(f"page {page} of {self.request.count}")

    def close(self):
        """Free the pages; the kernel frees those that the peer still maps when it unmaps them."""
        give_back(self.request, self.table.base, self.fd)
        self.table.base = NULL
        self.fd = -1
