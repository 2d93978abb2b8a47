# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""Granting, mapping and copying on the emulated machine.

Mapping is a real mmap of the peer's page, and unmapping a real munmap, so that it costs what
persistent grants exist to avoid: a page-table change and a TLB shootdown on every CPU that ran a
thread of this process. A copy is a checked memcpy through a mapping of the peer's whole memory,
which stands for the hypervisor's own.
"""

from cpython.buffer cimport PyBUF_READ, PyBUF_WRITE
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy
from posix.mman cimport (MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_PRIVATE, MAP_SHARED, PROT_NONE,
                         PROT_READ, PROT_WRITE, mmap, munmap)
from posix.unistd cimport _SC_PAGESIZE, sysconf

from xvd.dataplane.abi cimport (
    GNTST_BAD_COPY_ARG, GNTST_GENERAL_ERROR, GNTST_NO_DEVICE_SPACE, GNTST_NO_SPACE, GNTST_OKAY,
    XEN_PAGE_SIZE)
from xvd.dataplane.c cimport DEBUG_ASSERT
from xvd.dataplane.ports cimport grant_copy, grant_mapping, grant_ports, granter_ports, wrap
from xvd.machine.emulated.shared cimport (
    DomainState, claim_track, domain_state, free_track, grant, maptrack, pin, revoke, unpin)
from xvd.machine.pages cimport replace_pages

from xvd.errors import GrantError

STATUS_NAMES = {
    0: "okay", -1: "general error", -2: "bad domain", -3: "bad grant reference", -4: "bad handle",
    -7: "no space to map", -8: "permission denied", -9: "bad page", -10: "bad copy argument",
    -12: "page is paged out", -13: "out of space",
}


cdef uint32_t NO_TRACK = <uint32_t>-1


cdef struct foreign:
    domain_state *mapper
    domain_state *granter
    uint32_t session
    uint32_t hint
    maptrack *copy_track         # the one pin that a copy holds, so that a death in it is seen
    uint32_t *faults             # injected: status for the k-th coming operation, negated; 0 none
    uint32_t nr_faults
    uint32_t next_fault
    uint32_t stride              # of the pages of a mapping
    uint64_t mapped, unmapped, copied


# What mmap maps of a memfd at least: all of it is of the same share, where it is more than a page.
cdef size_t map_size = <size_t>sysconf(_SC_PAGESIZE)


cdef int32_t injected(foreign *f) noexcept nogil:
    """The status that a test asked for at this operation, or 0."""
    cdef int32_t status
    if f.next_fault >= f.nr_faults:
        return 0
    status = -<int32_t>f.faults[f.next_fault]
    f.next_fault += 1
    return status


cdef int32_t map_page(foreign *f, uint32_t gref, uint8_t *at, bint writable, uint32_t *last,
                      uint32_t *first) noexcept nogil:
    """Map one reference at a fixed address and chain its track entry to the ones before."""
    cdef uint32_t frame = 0, index
    cdef int prot = PROT_READ | PROT_WRITE if writable else PROT_READ
    cdef int32_t status = injected(f)
    cdef maptrack *track
    if status != GNTST_OKAY:
        return status
    track = claim_track(f.mapper, f.session, &f.hint)
    if track == NULL:
        return GNTST_NO_SPACE
    status = pin(f.granter, gref, f.mapper.domid, writable, f.session, track, &frame)
    if status == GNTST_OKAY and mmap(
            at, map_size, prot, MAP_SHARED | MAP_FIXED, f.granter.memory_fd,
            <uint64_t>frame * XEN_PAGE_SIZE) == MAP_FAILED:
        unpin(f.granter, f.session, track)
        status = GNTST_NO_DEVICE_SPACE
    if status != GNTST_OKAY:
        free_track(track)
        return status
    index = <uint32_t>(track - f.mapper.tracks)
    if last[0] == NO_TRACK:
        first[0] = index
    else:
        f.mapper.tracks[last[0]].next = index
    last[0] = index
    f.mapped += 1
    return GNTST_OKAY


cdef void forget_chain(foreign *f, uint32_t first, uint32_t mapped) noexcept nogil:
    """Tell the granter's table that pages are gone, which have to be.

    Tracks that are not ours any more were given back with the machine, and the rest of the chain
    with them; they may be anybody's by now.
    """
    cdef uint32_t index = first, following, i
    for i in range(mapped):
        if f.mapper.tracks[index].claim >> 16 != f.session:
            return
        following = f.mapper.tracks[index].next
        unpin(f.granter, f.session, &f.mapper.tracks[index])
        free_track(&f.mapper.tracks[index])
        index = following
    f.unmapped += mapped


cdef void unmap_chain(foreign *f, uint8_t *base, uint32_t count, uint32_t first,
                      uint32_t mapped) noexcept nogil:
    munmap(base, <size_t>count * f.stride)
    forget_chain(f, first, mapped)


cdef void map_set(foreign *f, grant_mapping *wanted, uint8_t *base) noexcept nogil:
    cdef uint32_t i, last = NO_TRACK, first = 0
    for i in range(wanted.count):
        wanted.status = map_page(f, wanted.grefs[i], base + <size_t>i * f.stride,
                                 wanted.writable, &last, &first)
        if wanted.status != GNTST_OKAY:
            unmap_chain(f, base, wanted.count, first, i)
            return
    wanted.base = base
    wanted.handle = first


cdef void map_sets(void *ctx, grant_mapping *sets, uint32_t n) noexcept nogil:
    """Map sets side by side in one piece of address space, each to be unmapped by itself: what is
    transferred together is then one part for the storage, and one area for the kernel."""
    cdef foreign *f = <foreign *>ctx
    cdef uint32_t i
    cdef size_t pages = 0
    cdef uint8_t *at
    for i in range(n):
        pages += sets[i].count
        sets[i].status = GNTST_NO_DEVICE_SPACE
    at = <uint8_t *>mmap(NULL, pages * f.stride, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if <void *>at == MAP_FAILED:
        return
    for i in range(n):
        map_set(f, &sets[i], at)
        at += <size_t>sets[i].count * f.stride


cdef void unmap_sets(void *ctx, grant_mapping *sets, uint32_t n) noexcept nogil:
    cdef uint32_t i
    for i in range(n):
        unmap_chain(<foreign *>ctx, sets[i].base, sets[i].count, <uint32_t>sets[i].handle,
                    sets[i].count)


cdef void replace_sets(void *ctx, grant_mapping *sets, uint32_t n) noexcept nogil:
    cdef foreign *f = <foreign *>ctx
    cdef uint32_t i
    for i in range(n):
        replace_pages(sets[i].base, <size_t>sets[i].count * f.stride)
        forget_chain(f, <uint32_t>sets[i].handle, sets[i].count)


cdef void copy_one(foreign *f, grant_copy *op) noexcept nogil:
    cdef uint32_t frame = 0
    cdef uint8_t *page
    if <uint32_t>op.offset + op.size > XEN_PAGE_SIZE:
        op.status = GNTST_BAD_COPY_ARG
        return
    op.status = injected(f)
    if op.status == GNTST_OKAY:
        op.status = pin(f.granter, op.gref, f.mapper.domid, op.to_grant, f.session, f.copy_track,
                        &frame)
    if op.status != GNTST_OKAY:
        return
    page = f.granter.memory + <uint64_t>frame * XEN_PAGE_SIZE + op.offset
    if op.to_grant:
        memcpy(page, op.local, op.size)
    else:
        memcpy(op.local, page, op.size)
    unpin(f.granter, f.session, f.copy_track)
    f.copied += 1


cdef void copy_all(void *ctx, grant_copy *ops, uint32_t n) noexcept nogil:
    cdef uint32_t i
    for i in range(n):
        copy_one(<foreign *>ctx, &ops[i])


cdef Py_ssize_t extent(uint32_t count, uint32_t stride) noexcept nogil:
    """Bytes from the beginning of the first of some pages to the end of the last."""
    return <Py_ssize_t>(count - 1) * stride + XEN_PAGE_SIZE


cdef class EmulatedForeignGrants:
    """`ForeignGrants` of one peer; one thread at a time (a queue's, once the queue has it).

    stride: the pages of the kernel that it pretends to run on: each mapped grant takes one, and
    what is behind its first 4096 bytes cannot be touched.
    """

    cdef foreign f
    cdef grant_ports table
    cdef DomainState mapper, granter

    def __init__(self, DomainState mapper, DomainState granter, uint32_t session,
                 uint32_t stride=XEN_PAGE_SIZE):
        self.mapper = mapper
        self.granter = granter
        self.f.mapper = &mapper.c
        self.f.granter = &granter.c
        self.f.session = session
        self.f.stride = self.table.stride = stride
        self.f.hint = session * 64 % mapper.c.nr_tracks
        self.f.copy_track = claim_track(self.f.mapper, session, &self.f.hint)
        if self.f.copy_track == NULL:
            raise GrantError(f"domain {mapper.domid}: all {mapper.c.nr_tracks} map-track entries "
                             "are taken; raise the host's limit", GNTST_NO_SPACE)
        self.table.ctx = &self.f
        self.table.unmaps_at_once = 1
        self.table.map = map_sets
        self.table.unmap = unmap_sets
        self.table.copy = copy_all
        self.table.replace = replace_sets

    def __dealloc__(self):
        free(self.f.faults)

    @property
    def ports(self):
        """Capsule ``xvd.grant_ports``."""
        return wrap(&self.table, "xvd.grant_ports")

    @property
    def unmaps_at_once(self):
        """Always, here. Real Xen on Linux does not: set it to test what is done about that."""
        return bool(self.table.unmaps_at_once)

    @unmaps_at_once.setter
    def unmaps_at_once(self, bint yes):
        self.table.unmaps_at_once = yes

    @property
    def counts(self):
        """Pages (mapped, unmapped, copied) through this object so far."""
        return self.f.mapped, self.f.unmapped, self.f.copied

    def inject(self, statuses):
        """Let the coming operations fail, one status (GNTST, 0 = let it be) for each, in order."""
        values = list(statuses)
        free(self.f.faults)
        self.f.nr_faults = self.f.next_fault = 0
        self.f.faults = <uint32_t *>calloc(max(1, len(values)), sizeof(uint32_t))
        for i, status in enumerate(values):
            self.f.faults[i] = -status
        self.f.nr_faults = len(values)

    def map(self, grefs, *, bint writable=True):
        """Map references contiguously: see `machine.interface.ForeignGrants.map`."""
        self.check_open()
        return EmulatedMapping(self, grefs, writable)

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
        if self.f.copy_track == NULL:
            raise GrantError(f"the grants of domain {self.granter.domid} were closed",
                             GNTST_GENERAL_ERROR)

    cdef transfer(self, uint32_t gref, uint32_t offset, uint32_t size, uint8_t *local, bint write):
        cdef grant_copy op
        self.check_open()
        op.local = local
        op.gref = gref
        op.offset = min(offset, XEN_PAGE_SIZE)
        op.size = min(size, XEN_PAGE_SIZE)
        op.to_grant = write
        op.status = GNTST_BAD_COPY_ARG
        if size <= XEN_PAGE_SIZE and offset <= XEN_PAGE_SIZE - size:
            copy_one(&self.f, &op)
        if op.status != GNTST_OKAY:
            raise self.error("copy", gref, op.status)

    def error(self, verb, gref, status):
        """A `GrantError` that names the domain, the reference and the cause."""
        name = STATUS_NAMES.get(status, status)
        return GrantError(f"cannot {verb} grant {gref} of domain {self.granter.domid}: {name}",
                          status)

    def close(self):
        """Release the peer's table."""
        if self.f.copy_track != NULL:
            if self.f.copy_track.claim >> 16 == self.f.session:
                free_track(self.f.copy_track)
            self.f.copy_track = NULL


cdef class EmulatedMapping:
    """`Mapping`; made by `EmulatedForeignGrants.map`."""

    cdef EmulatedForeignGrants grants
    cdef grant_mapping m
    cdef uint32_t *grefs
    cdef readonly bint writable

    def __cinit__(self, EmulatedForeignGrants grants, grefs, bint writable):
        values = list(grefs)
        if not values:
            raise GrantError("no grant references to map", -1)
        self.grefs = <uint32_t *>calloc(len(values), sizeof(uint32_t))
        for i, gref in enumerate(values):
            self.grefs[i] = gref
        self.grants = grants
        self.writable = writable
        self.m.grefs = self.grefs
        self.m.count = len(values)
        self.m.writable = writable
        map_sets(&grants.f, &self.m, 1)
        if self.m.status != GNTST_OKAY:
            raise grants.error("map", values if len(values) > 1 else values[0], self.m.status)

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
        size = extent(self.m.count, self.grants.f.stride)
        return PyMemoryView_FromMemory(<char *>self.m.base, size,
                                       PyBUF_WRITE if self.writable else PyBUF_READ)

    def close(self):
        """Unmap."""
        if self.m.base != NULL:
            unmap_sets(&self.grants.f, &self.m, 1)
            self.m.base = NULL


cdef struct shared:
    domain_state *own
    uint32_t peer
    uint32_t first_frame
    uint32_t frames_each         # frames from one page to the next
    uint32_t *grefs
    uint32_t count


cdef void grant_page(void *ctx, uint32_t page, uint32_t readonly) noexcept nogil:
    cdef shared *s = <shared *>ctx
    DEBUG_ASSERT(page < s.count)
    grant(s.own, s.grefs[page], s.peer, s.first_frame + page * s.frames_each, readonly)


cdef int revoke_page(void *ctx, uint32_t page) noexcept nogil:
    cdef shared *s = <shared *>ctx
    DEBUG_ASSERT(page < s.count)
    return revoke(s.own, s.grefs[page])


cdef class EmulatedSharedPages:
    """`SharedPages`; one thread at a time. `release(frame, count, grefs)` gives them back.

    Page i lies in frame `first_frame` + i * (stride / 4096), as on a kernel of such pages.
    """

    cdef shared s
    cdef granter_ports table
    cdef DomainState own
    cdef object release
    cdef readonly list grefs

    def __init__(self, DomainState own, uint32_t peer, uint32_t first_frame, list grefs, release,
                 uint32_t stride=XEN_PAGE_SIZE):
        cdef uint32_t i
        self.own = own
        self.grefs = grefs
        self.release = release
        self.s.own = &own.c
        self.s.peer = peer
        self.s.first_frame = first_frame
        self.s.frames_each = stride // XEN_PAGE_SIZE
        self.s.count = len(grefs)
        self.s.grefs = <uint32_t *>calloc(len(grefs), sizeof(uint32_t))
        for i in range(self.s.count):
            self.s.grefs[i] = grefs[i]
            grant_page(&self.s, i, False)
        self.table.ctx = &self.s
        self.table.stride = stride
        self.table.base = own.c.memory + <uint64_t>first_frame * XEN_PAGE_SIZE
        self.table.grefs = self.s.grefs
        self.table.count = self.s.count
        self.table.grant = grant_page
        self.table.revoke = revoke_page

    def __dealloc__(self):
        free(self.s.grefs)

    @property
    def count(self):
        """Number of pages."""
        return self.s.count

    @property
    def stride(self):
        """Bytes from one page to the next."""
        return self.table.stride

    @property
    def view(self):
        """The pages as writable bytes."""
        return PyMemoryView_FromMemory(<char *>self.table.base,
                                       extent(self.s.count, self.table.stride), PyBUF_WRITE)

    @property
    def ports(self):
        """Capsule ``xvd.granter_ports``."""
        return wrap(&self.table, "xvd.granter_ports")

    def grant(self, uint32_t page, *, bint readonly=False):
        """Let the peer map a page."""
        self.check(page)
        grant_page(&self.s, page, readonly)

    def revoke(self, uint32_t page):
        """Take the grant back; False while the peer has it mapped."""
        self.check(page)
        return revoke_page(&self.s, page) == 0

    cdef check(self, uint32_t page):
        if page >= self.s.count:
            raise IndexError(f"page {page} of {self.s.count}")

    def close(self):
        """Revoke and free; pages still mapped are freed when they no longer are."""
        if self.release is not None:
            release, self.release = self.release, None
            release(self.s.first_frame, self.s.count, self.grefs)
