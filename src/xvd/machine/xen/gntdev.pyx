# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""The grants of one peer on real Xen: mapped and copied through /dev/xen/gntdev.

gntdev takes any reference at its ioctl and maps at mmap, a whole set or nothing, with EINVAL for
every cause. Which reference was wrong, and why, is found out afterwards, for the text of an
exception only: by copying one byte from each, because copies have a status of their own.
"""

from cpython.buffer cimport PyBUF_READ, PyBUF_WRITE
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.errno cimport EAGAIN, ENOMEM, ENOSPC, errno
from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from posix.mman cimport (MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_PRIVATE, MAP_SHARED, PROT_NONE,
                         PROT_READ, PROT_WRITE, mmap, munmap)
from posix.unistd cimport _SC_PAGESIZE, close, sysconf

from xvd.dataplane.abi cimport (
    BLKIF_MAX_INDIRECT_SEGMENTS, GNTST_BAD_COPY_ARG, GNTST_EAGAIN, GNTST_GENERAL_ERROR,
    GNTST_NO_SPACE, GNTST_OKAY, XEN_PAGE_SIZE)
from xvd.dataplane.ports cimport grant_copy, grant_mapping, grant_ports, wrap
from xvd.machine.pages cimport replace_pages
from xvd.machine.xen.devices cimport (
    XVD_COPY_DEST_GREF, XVD_COPY_SOURCE_GREF, XVD_GNTDEV_COPY, XVD_GNTDEV_MAP, XVD_GNTDEV_UNMAP,
    ioctl, xvd_copy_grants, xvd_copy_segment, xvd_copy_side, xvd_grant_ref, xvd_map_grants,
    xvd_unmap_grants)

import os

from xvd.errors import GrantError
from xvd.machine.xen.here import GNTDEV
from xvd.types import GrantStatus

STATUS_NAMES = {
    GrantStatus.OKAY: "okay", GrantStatus.GENERAL_ERROR: "general error",
    GrantStatus.BAD_DOMAIN: "bad domain", GrantStatus.BAD_GNTREF: "bad grant reference",
    GrantStatus.BAD_HANDLE: "bad handle", GrantStatus.BAD_VIRT_ADDR: "bad address",
    GrantStatus.NO_DEVICE_SPACE: "no space to map",
    GrantStatus.PERMISSION_DENIED: "permission denied", GrantStatus.BAD_PAGE: "bad page",
    GrantStatus.BAD_COPY_ARG: "bad copy argument", GrantStatus.EAGAIN: "page is paged out",
    GrantStatus.NO_SPACE: "out of space",
}

cdef enum:
    SET_PAGES_MAX = BLKIF_MAX_INDIRECT_SEGMENTS  # most pages of one mapping: one request's
    COPY_BATCH = 64              # operations for one ioctl; the kernel takes 16 at a time itself


cdef struct foreign:
    int fd                       # -1: closed
    uint32_t domid
    xvd_map_grants *request      # with room for SET_PAGES_MAX references
    xvd_copy_segment segments[COPY_BATCH]
    uint32_t stride              # from one page of a mapping to the next: the kernel's pages
    uint64_t mapped, unmapped, copied


cdef int32_t status_of(int number) noexcept nogil:
    if number == ENOMEM or number == ENOSPC:
        return GNTST_NO_SPACE
    return GNTST_EAGAIN if number == EAGAIN else GNTST_GENERAL_ERROR


cdef void forget(foreign *f, uint64_t index, uint32_t count) noexcept nogil:
    """Tell gntdev that a mapped or failed set is not needed; closing the device did so already."""
    cdef xvd_unmap_grants request
    request.index = index
    request.count = count
    request.pad = 0
    if f.fd >= 0:
        ioctl(f.fd, XVD_GNTDEV_UNMAP, &request)


cdef void map_set(foreign *f, grant_mapping *wanted, uint8_t *at) noexcept nogil:
    """Over the reserved pages at `at`. Each grant takes one page of the kernel; where that is
    larger, there is nothing behind the peer's 4096 bytes."""
    cdef uint32_t i
    cdef size_t size = <size_t>wanted.count * f.stride
    cdef int prot = PROT_READ | PROT_WRITE if wanted.writable else PROT_READ
    f.request.count = wanted.count
    for i in range(wanted.count):
        f.request.refs[i].domid = f.domid
        f.request.refs[i].gref = wanted.grefs[i]
    if ioctl(f.fd, XVD_GNTDEV_MAP, f.request) < 0:
        wanted.status = status_of(errno)
        return
    wanted.handle = f.request.index
    if mmap(at, size, prot, MAP_SHARED | MAP_FIXED, f.fd, f.request.index) == MAP_FAILED:
        wanted.status = status_of(errno)
        forget(f, wanted.handle, wanted.count)
        return
    wanted.base = at
    wanted.status = GNTST_OKAY
    f.mapped += wanted.count


cdef void map_sets(void *ctx, grant_mapping *sets, uint32_t n) noexcept nogil:
    """Map sets side by side in one piece of address space, each to be unmapped by itself: what is
    transferred together is then one part for the storage."""
    cdef foreign *f = <foreign *>ctx
    cdef uint32_t i
    cdef size_t pages = 0
    cdef uint8_t *at
    for i in range(n):
        pages += sets[i].count
        sets[i].status = GNTST_NO_SPACE
    at = <uint8_t *>mmap(NULL, pages * f.stride, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if <void *>at == MAP_FAILED:
        return
    for i in range(n):
        if sets[i].count <= SET_PAGES_MAX and f.fd >= 0:
            map_set(f, &sets[i], at)
        if sets[i].status != GNTST_OKAY:
            munmap(at, <size_t>sets[i].count * f.stride)
        at += <size_t>sets[i].count * f.stride


cdef void unmap_sets(void *ctx, grant_mapping *sets, uint32_t n) noexcept nogil:
    """The pages go first: gntdev keeps what is still mapped when it is told to forget."""
    cdef foreign *f = <foreign *>ctx
    cdef uint32_t i
    for i in range(n):
        munmap(sets[i].base, <size_t>sets[i].count * f.stride)
        forget(f, sets[i].handle, sets[i].count)
        f.unmapped += sets[i].count


cdef void replace_sets(void *ctx, grant_mapping *sets, uint32_t n) noexcept nogil:
    cdef foreign *f = <foreign *>ctx
    cdef uint32_t i
    for i in range(n):
        replace_pages(sets[i].base, <size_t>sets[i].count * f.stride)
        forget(f, sets[i].handle, sets[i].count)
        f.unmapped += sets[i].count


cdef void prepare(foreign *f, grant_copy *op, xvd_copy_segment *s) noexcept nogil:
    cdef xvd_copy_side *local = &s.source if op.to_grant else &s.dest
    cdef xvd_copy_side *granted = &s.dest if op.to_grant else &s.source
    local.local = op.local
    granted.foreign.gref = op.gref
    granted.foreign.offset = op.offset
    granted.foreign.domid = <uint16_t>f.domid
    s.size = op.size
    s.flags = XVD_COPY_DEST_GREF if op.to_grant else XVD_COPY_SOURCE_GREF
    s.status = GNTST_GENERAL_ERROR


cdef void copy_batch(foreign *f, grant_copy *ops, uint32_t n) noexcept nogil:
    """One ioctl for those within their page: another would fail all of them, with EINVAL."""
    cdef xvd_copy_grants request
    cdef uint32_t i, k = 0
    cdef int rc = 0
    for i in range(n):
        if <uint32_t>ops[i].offset + ops[i].size <= XEN_PAGE_SIZE:
            prepare(f, &ops[i], &f.segments[k])
            k += 1
    request.count = k
    request.segments = f.segments
    if k:
        rc = ioctl(f.fd, XVD_GNTDEV_COPY, &request)
    k = 0
    for i in range(n):
        if <uint32_t>ops[i].offset + ops[i].size > XEN_PAGE_SIZE:
            ops[i].status = GNTST_BAD_COPY_ARG
            continue
        ops[i].status = f.segments[k].status if rc == 0 else GNTST_GENERAL_ERROR
        f.copied += ops[i].status == GNTST_OKAY
        k += 1


cdef void copy_all(void *ctx, grant_copy *ops, uint32_t n) noexcept nogil:
    cdef uint32_t done = 0, some
    while done < n:
        some = min(n - done, <uint32_t>COPY_BATCH)
        copy_batch(<foreign *>ctx, ops + done, some)
        done += some


cdef class XenForeignGrants:
    """`ForeignGrants` of one peer; one thread at a time (a queue's, once the queue has it).

    One open device for each, so that nothing of one peer is reached through another's. Raises
    `GrantError` where the device is not to be had. That there is no such domain shows only when one
    of its grants is used.
    """

    cdef foreign f
    cdef grant_ports table
    cdef object __weakref__

    def __cinit__(self, uint32_t peer):
        self.f.fd = -1
        self.f.domid = peer
        self.f.stride = self.table.stride = <uint32_t>sysconf(_SC_PAGESIZE)
        self.f.request = <xvd_map_grants *>calloc(
            1, sizeof(xvd_map_grants) + SET_PAGES_MAX * sizeof(xvd_grant_ref))
        if self.f.request == NULL:
            raise MemoryError
        try:
            self.f.fd = os.open(GNTDEV, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise GrantError(f"cannot use grants: {GNTDEV}: {error.strerror}; on a Xen domain, as "
                             "root: modprobe xen-gntdev", GNTST_GENERAL_ERROR) from None
        self.table.ctx = &self.f
        self.table.unmaps_at_once = 0
        self.table.map = map_sets
        self.table.unmap = unmap_sets
        self.table.copy = copy_all
        self.table.replace = replace_sets

    def __dealloc__(self):
        if self.f.fd >= 0:
            close(self.f.fd)
        free(self.f.request)

    @property
    def ports(self):
        """Capsule ``xvd.grant_ports``."""
        return wrap(&self.table, "xvd.grant_ports")

    @property
    def counts(self):
        """Pages (mapped, unmapped, copied) through this object so far."""
        return self.f.mapped, self.f.unmapped, self.f.copied

    def map(self, grefs, *, bint writable=True):
        """Map references contiguously: see `machine.interface.ForeignGrants.map`."""
        self.check_open()
        return XenMapping(self, grefs, writable)

    def read(self, uint32_t gref, uint32_t offset, uint32_t size):
        """Copy bytes out of a granted page."""
        cdef bytearray data = bytearray(min(size, XEN_PAGE_SIZE))
        self.transfer(gref, offset, size, <uint8_t *>data, False)
        return bytes(data)

    def write(self, uint32_t gref, uint32_t offset, const uint8_t[::1] data):
        """Copy bytes into a granted page."""
        if data.shape[0]:
            self.transfer(gref, offset, data.shape[0], <uint8_t *>&data[0], True)

    cdef check_open(self):
        if self.f.fd < 0:
            raise GrantError(f"the grants of domain {self.f.domid} were closed",
                             GNTST_GENERAL_ERROR)

    cdef int32_t try_copy(self, uint32_t gref, uint32_t offset, uint32_t size, uint8_t *local,
                          bint write):
        cdef grant_copy op
        op.local = local
        op.gref = gref
        op.offset = min(offset, XEN_PAGE_SIZE)
        op.size = min(size, XEN_PAGE_SIZE)
        op.to_grant = write
        op.status = GNTST_BAD_COPY_ARG
        if size <= XEN_PAGE_SIZE and offset <= XEN_PAGE_SIZE - size:
            copy_all(&self.f, &op, 1)
        return op.status

    cdef transfer(self, uint32_t gref, uint32_t offset, uint32_t size, uint8_t *local, bint write):
        self.check_open()
        status = self.try_copy(gref, offset, size, local, write)
        if status != GNTST_OKAY:
            raise self.error("copy", gref, status)

    def error(self, verb, gref, status):
        """A `GrantError` that names the domain, the reference and the cause."""
        name = STATUS_NAMES.get(status, status)
        return GrantError(f"cannot {verb} grant {gref} of domain {self.f.domid}: {name}", status)

    def blame(self, grefs, int32_t status):
        """The error of a set that could not be mapped: of its first bad reference, if one is."""
        cdef uint8_t byte = 0
        for gref in grefs:
            found = self.try_copy(gref, 0, 1, &byte, False)
            if found != GNTST_OKAY:
                return self.error("map", gref, found)
        return self.error("map", grefs if len(grefs) > 1 else grefs[0], status)

    def close(self):
        """Release the peer's grants; a mapping that is still there lives until it is closed."""
        if self.f.fd >= 0:
            close(self.f.fd)
            self.f.fd = -1


cdef class XenMapping:
    """`Mapping`; made by `XenForeignGrants.map`."""

    cdef XenForeignGrants grants
    cdef grant_mapping m
    cdef uint32_t *grefs
    cdef readonly bint writable

    def __cinit__(self, XenForeignGrants grants, grefs, bint writable):
        values = list(grefs)
        if not values:
            raise GrantError("no grant references to map", GNTST_GENERAL_ERROR)
        self.grefs = <uint32_t *>calloc(len(values), sizeof(uint32_t))
        if self.grefs == NULL:
            raise MemoryError
        for i, gref in enumerate(values):
            self.grefs[i] = gref
        self.grants = grants
        self.writable = writable
        self.m.grefs = self.grefs
        self.m.count = len(values)
        self.m.writable = writable
        map_sets(&grants.f, &self.m, 1)
        if self.m.status != GNTST_OKAY:
            raise grants.blame(values, self.m.status)

    def __dealloc__(self):
        free(self.grefs)

    @property
    def address(self):
        """Virtual address of the first page; 0 once closed."""
        return <size_t>self.m.base

    @property
    def stride(self):
        """Bytes from one page to the next."""
        return self.grants.f.stride

    @property
    def view(self):
        """The pages as bytes; not to be used after `close`."""
        if self.m.base == NULL:
            raise ValueError("the pages were unmapped")
        size = <Py_ssize_t>(self.m.count - 1) * self.grants.f.stride + XEN_PAGE_SIZE
        return PyMemoryView_FromMemory(<char *>self.m.base, size,
                                       PyBUF_WRITE if self.writable else PyBUF_READ)

    def close(self):
        """Unmap."""
        if self.m.base != NULL:
            unmap_sets(&self.grants.f, &self.m, 1)
            self.m.base = NULL
