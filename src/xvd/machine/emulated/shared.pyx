# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, auto_pickle=False, embedsignature=True, binding=True
"""The hypervisor's accounting of one domain, in memory that every process of the machine maps.

Two memfds stand for a domain: its *memory*, whose first frames are its grant table (real v1
entries), and the *heap*, which holds what Xen would keep for itself: a count of pins for each
reference, the track of what the domain has mapped of others, and its event channel ports. The
operations below are the hypervisor's, run by whichever process makes the call, so that mapping a
grant costs no message to anybody.

A process may be killed between any two instructions. So each pin is tied to a track entry that
says how far it got, a lock names the session that holds it, and the count changes by the same store
that drops the lock: from the three the cleaner (`clean_session`) can always tell what a dead
session still held.

The fidelity ends there: a process that has a domain's memory mapped could read all of it
(docs/emulation.md).
"""

from libc.string cimport memset
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.fcntl cimport F_DUPFD_CLOEXEC, fcntl
from posix.unistd cimport close

from xvd.dataplane.abi cimport (
    GNTST_BAD_GNTREF, GNTST_BAD_PAGE, GNTST_GENERAL_ERROR, GNTST_OKAY, XEN_PAGE_SIZE)
from xvd.dataplane.c cimport (
    DEBUG_ASSERT, xvd_cas32, xvd_cas64, xvd_exchange32, xvd_fence, xvd_load64, xvd_load_acquire,
    xvd_pause, xvd_store64, xvd_store_release)

from xvd.errors import GrantError

cdef extern from "sched.h" nogil:
    int sched_yield()

cdef enum:
    HEADER_BYTES = 64            # of the heap; its first word is the generation
    ACTIVE_BYTES = 8
    TRACK_BYTES = 16
    SLOT_BYTES = 32

# The active word: lock owner (session) in the top 16 bits, then 24 bits of write pins, 24 of reads.
cdef uint64_t OWNER_SHIFT = 48
cdef uint64_t WRITE_ONE = <uint64_t>1 << 24
cdef uint64_t READ_ONE = 1
cdef uint64_t PIN_MASK = (<uint64_t>1 << 48) - 1
cdef uint64_t COUNT_MASK = (<uint64_t>1 << 24) - 1


cdef uint64_t lock(domain_state *d, uint32_t gref, uint32_t session) noexcept nogil:
    """Take the reference's lock; returns the pins. Held for a few instructions only."""
    cdef uint64_t word
    cdef uint32_t spins = 0
    while True:
        word = xvd_load64(&d.active[gref])
        if word >> OWNER_SHIFT == 0 and xvd_cas64(
                &d.active[gref], word, word | (<uint64_t>session << OWNER_SHIFT)):
            return word
        spins += 1
        if spins % 64 == 0:
            sched_yield()
        else:
            xvd_pause()


cdef void unlock(domain_state *d, uint32_t gref, uint64_t pins) noexcept nogil:
    xvd_store64(&d.active[gref], pins & PIN_MASK)


cdef void set_claim(maptrack *track, uint32_t session, uint32_t state,
                    bint writable) noexcept nogil:
    xvd_store_release(&track.claim, session << 16 | (<uint32_t>writable << 8) | state)


cdef void change_flags(grant_entry *entry, uint16_t set_bits, uint16_t clear_bits) noexcept nogil:
    """Change the status bits of an entry that its owner may be writing at the same time."""
    cdef uint32_t old
    while True:
        old = xvd_load_acquire(entry)
        if xvd_cas32(entry, old, (old & ~<uint32_t>clear_bits) | set_bits):
            return


cdef int32_t check_entry(grant_entry *entry, uint32_t mapper, bint writable) noexcept nogil:
    """Check an entry as the hypervisor does; one load, so that flags and domain belong together."""
    cdef uint32_t word = xvd_load_acquire(entry)
    cdef uint32_t flags = word & 0xFFFF
    if (flags & GTF_TYPE_MASK) != GTF_PERMIT_ACCESS or word >> 16 != mapper:
        return GNTST_GENERAL_ERROR if flags & GTF_TYPE_MASK else GNTST_BAD_GNTREF
    if writable and flags & GTF_READONLY:
        return GNTST_GENERAL_ERROR
    return GNTST_OKAY


cdef int32_t pin(domain_state *granter, uint32_t gref, uint32_t mapper, bint writable,
                 uint32_t session, maptrack *track, uint32_t *frame) noexcept nogil:
    """Check the entry as the hypervisor would and hold it; `track` is a claimed entry of ours."""
    cdef uint64_t pins
    cdef int32_t status
    cdef grant_entry *entry
    if gref >= granter.nr_grefs:
        return GNTST_BAD_GNTREF
    entry = &granter.grants[gref]
    track.gref = gref
    track.granter = granter.generation << 16 | granter.domid
    pins = lock(granter, gref, session)
    status = check_entry(entry, mapper, writable)
    frame[0] = entry.frame
    if status == GNTST_OKAY and <uint64_t>frame[0] >= granter.memory_size // XEN_PAGE_SIZE:
        status = GNTST_BAD_PAGE
    if status != GNTST_OKAY:
        unlock(granter, gref, pins)
        return status
    set_claim(track, session, TRACK_PINNING, writable)
    change_flags(entry, GTF_READING | GTF_WRITING if writable else GTF_READING, 0)
    unlock(granter, gref, pins + (WRITE_ONE if writable else READ_ONE))
    set_claim(track, session, TRACK_LIVE, writable)
    return GNTST_OKAY


cdef void drop_pin(domain_state *granter, uint32_t gref, uint64_t pins,
                   bint writable) noexcept nogil:
    """Under the lock: one pin less; the entry's bits follow; drops the lock."""
    cdef uint16_t gone = 0
    pins = (pins & PIN_MASK) - (WRITE_ONE if writable else READ_ONE)
    if pins >> 24 == 0:
        gone |= GTF_WRITING
    if pins == 0:
        gone |= GTF_READING
    if gone:
        change_flags(&granter.grants[gref], 0, gone)
    unlock(granter, gref, pins)


cdef void unpin(domain_state *granter, uint32_t session, maptrack *track) noexcept nogil:
    """Release what `pin` took. The track entry stays claimed, for the next pin or `free_track`."""
    cdef uint32_t claim = track.claim
    cdef bint writable = (claim >> 8) & 1
    cdef uint64_t pins
    DEBUG_ASSERT(claim & 0xFF == TRACK_LIVE)
    pins = lock(granter, track.gref, session)
    set_claim(track, session, TRACK_UNPINNING, writable)
    drop_pin(granter, track.gref, pins, writable)
    set_claim(track, session, TRACK_CLAIMED, False)


cdef maptrack *claim_track(domain_state *mapper, uint32_t session, uint32_t *hint) noexcept nogil:
    """A free track entry, searched from where the last one was found; NULL when all are taken."""
    cdef uint32_t i, at
    for i in range(mapper.nr_tracks):
        at = (hint[0] + i) % mapper.nr_tracks
        if mapper.tracks[at].claim == 0 and xvd_cas32(
                &mapper.tracks[at].claim, 0, session << 16 | TRACK_CLAIMED):
            hint[0] = at + 1
            mapper.tracks[at].next = at
            return &mapper.tracks[at]
    return NULL


cdef void free_track(maptrack *track) noexcept nogil:
    xvd_store_release(&track.claim, 0)


cdef void grant(domain_state *own, uint32_t gref, uint32_t peer, uint32_t frame,
                uint32_t readonly) noexcept nogil:
    """Write an entry as a guest does: frame and domain first, flags last, so that it is never
    valid while half written."""
    cdef grant_entry *entry = &own.grants[gref]
    entry.frame = frame
    xvd_store_release(entry, peer << 16)
    xvd_store_release(entry, peer << 16 | GTF_PERMIT_ACCESS | (GTF_READONLY if readonly else 0))


cdef int revoke(domain_state *own, uint32_t gref) noexcept nogil:
    """0, or -1 while somebody has it mapped; one compare-and-swap decides."""
    cdef uint32_t word
    while True:
        word = xvd_load_acquire(&own.grants[gref])
        if word & (GTF_READING | GTF_WRITING):
            return -1
        if xvd_cas32(&own.grants[gref], word, 0):
            return 0


cdef class DomainState:
    """A domain's two memfds, mapped. Any thread; the operations on it are lock-free or lock for a
    few instructions. Keeps its own duplicates of the descriptors."""

    def __cinit__(self, int domid, int memory_fd, int heap_fd, limits):
        self.c.memory = NULL
        self.heap = NULL
        self.limits = limits
        self.c.domid = domid
        self.c.nr_grefs = limits.grefs
        self.c.nr_tracks = limits.tracks
        self.c.nr_slots = limits.ports
        self.c.memory_size = <uint64_t>limits.pages * XEN_PAGE_SIZE
        self.heap_size = heap_bytes(limits)
        self.c.memory_fd = fcntl(memory_fd, F_DUPFD_CLOEXEC, 0)
        self.c.memory = <uint8_t *>self.map_whole(memory_fd, self.c.memory_size)
        self.heap = self.map_whole(heap_fd, self.heap_size)
        self.c.grants = <grant_entry *>self.c.memory
        self.c.generation = (<uint32_t *>self.heap)[0]
        self.c.active = <uint64_t *>(<uint8_t *>self.heap + HEADER_BYTES)
        self.c.tracks = <maptrack *>(<uint8_t *>self.c.active + ACTIVE_BYTES * self.c.nr_grefs)
        self.c.slots = <port_slot *>(<uint8_t *>self.c.tracks + TRACK_BYTES * self.c.nr_tracks)

    cdef void *map_whole(self, int fd, uint64_t size) except NULL:
        cdef void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
        if at == MAP_FAILED:
            raise MemoryError(f"domain {self.c.domid}: cannot map {size} bytes of its memory")
        return at

    def __dealloc__(self):
        if self.c.memory != NULL:
            munmap(self.c.memory, self.c.memory_size)
        if self.heap != NULL:
            munmap(self.heap, self.heap_size)
        if self.c.memory_fd > 0:
            close(self.c.memory_fd)

    @property
    def domid(self) -> int:
        """The domain's number."""
        return self.c.domid

    def entry(self, uint32_t gref):
        """A grant entry as (flags, domid, frame): for tests and tools."""
        if gref >= self.c.nr_grefs:
            raise IndexError(f"domain {self.c.domid} has {self.c.nr_grefs} grant references")
        return self.c.grants[gref].flags, self.c.grants[gref].domid, self.c.grants[gref].frame

    def try_revoke(self, uint32_t gref) -> bool:
        """Take a grant back; False while somebody has it mapped."""
        return revoke(&self.c, gref) == 0

    def zero(self, uint32_t frame, uint32_t count):
        """Clear pages before they are handed out."""
        if <uint64_t>frame + count > self.c.memory_size >> 12:
            raise IndexError(f"frame {frame} + {count} is past domain {self.c.domid}'s memory")
        memset(self.c.memory + <uint64_t>frame * XEN_PAGE_SIZE, 0, <size_t>count * XEN_PAGE_SIZE)

    def pins(self) -> int:
        """How many pins others hold on this domain's grants: 0 when nothing is mapped."""
        cdef uint64_t total = 0
        cdef uint32_t i
        for i in range(self.c.nr_grefs):
            total += (self.c.active[i] & COUNT_MASK) + ((self.c.active[i] >> 24) & COUNT_MASK)
        return total

    def tracks_in_use(self) -> int:
        """How many mappings of other domains' pages this domain holds."""
        cdef uint32_t i, total = 0
        for i in range(self.c.nr_tracks):
            if self.c.tracks[i].claim & 0xFF > TRACK_CLAIMED:
                total += 1
        return total

    def port(self, uint32_t port):
        """A port as (state, remote domid, remote port, pending, session)."""
        cdef port_slot *slot = self.slot(port)
        return slot.state, slot.remote_domid, slot.remote_port, slot.pending, slot.session

    def set_port(self, uint32_t port, uint32_t state, uint32_t remote_domid, uint32_t remote_port,
                 uint32_t session):
        """Write a port's state, the last field last. The host's alone, under its lock."""
        cdef port_slot *slot = self.slot(port)
        slot.remote_domid = remote_domid
        slot.remote_port = remote_port
        slot.session = session
        if state != PORT_INTERDOMAIN:
            slot.pending = 0
        xvd_store_release(&slot.state, state)

    def set_pending(self, uint32_t port) -> bool:
        """Mark an event pending; False if one was already."""
        return xvd_exchange32(&self.slot(port).pending, 1) == 0

    cdef port_slot *slot(self, uint32_t port) except NULL:
        if not 0 < port < self.c.nr_slots:
            raise IndexError(f"domain {self.c.domid} has ports 1..{self.c.nr_slots - 1}")
        return &self.c.slots[port]


def heap_bytes(limits) -> int:
    """Size of a domain's heap memfd. Its maker writes the generation, a u16, at its start."""
    return (HEADER_BYTES + limits.grefs * ACTIVE_BYTES + limits.tracks * TRACK_BYTES
            + limits.ports * SLOT_BYTES)


def clean_session(DomainState mapper, granters, uint32_t session) -> int:
    """Give back everything that a dead session of `mapper` had mapped; returns how many pins.

    `granters`: {domid: DomainState} of every domain of the machine. What an entry's state means:
    CLAIMED holds nothing; LIVE holds a pin; PINNING holds one unless the lock is still the dead
    session's; UNPINNING holds one only if it is.
    """
    cdef uint32_t i, claim, state
    cdef maptrack *track
    cdef DomainState granter
    cdef bint locked
    freed = 0
    for i in range(mapper.c.nr_tracks):
        track = &mapper.c.tracks[i]
        claim = xvd_load_acquire(&track.claim)
        if claim >> 16 != session:
            continue
        state = claim & 0xFF
        granter = granters.get(track.granter & 0xFFFF) if state > TRACK_CLAIMED else None
        if granter is not None and granter.c.generation == track.granter >> 16:
            locked = granter.c.active[track.gref] >> OWNER_SHIFT == session
            if state == TRACK_LIVE or locked == (state == TRACK_UNPINNING):
                release_pin(granter, track.gref, session, locked, (claim >> 8) & 1)
                freed += 1
        free_track(track)
    for granter in granters.values():
        break_locks(granter, session)
    return freed


cdef void release_pin(DomainState granter, uint32_t gref, uint32_t session, bint locked,
                      bint writable) noexcept:
    cdef uint64_t pins = granter.c.active[gref] if locked else lock(&granter.c, gref, session)
    drop_pin(&granter.c, gref, pins, writable)


cdef void break_locks(DomainState granter, uint32_t session) noexcept:
    """Locks the dead session held: the pins in the word are right, the entry's bits may not be."""
    cdef uint32_t gref
    cdef uint64_t pins
    cdef uint16_t wanted
    for gref in range(granter.c.nr_grefs):
        if granter.c.active[gref] >> OWNER_SHIFT != session:
            continue
        pins = granter.c.active[gref] & PIN_MASK
        wanted = (GTF_READING if pins else 0) | (GTF_WRITING if pins >> 24 else 0)
        change_flags(&granter.c.grants[gref], wanted, (GTF_READING | GTF_WRITING) & ~wanted)
        unlock(&granter.c, gref, pins)
