# SPDX-License-Identifier: Apache-2.0
"""One domain's shared state as this process has it mapped; see shared.pyx."""

from libc.stdint cimport int32_t, uint8_t, uint16_t, uint32_t, uint64_t


cdef enum:
    GTF_PERMIT_ACCESS = 1
    GTF_TYPE_MASK = 3
    GTF_READONLY = 4
    GTF_READING = 8
    GTF_WRITING = 16

# Where a mapping stands; what each tells the cleaner of a dead session is in shared.pyx.
cdef enum track_state:
    TRACK_FREE = 0
    TRACK_CLAIMED = 1
    TRACK_PINNING = 2
    TRACK_LIVE = 3
    TRACK_UNPINNING = 4

cdef struct grant_entry:         # v1, as in Xen's grant_table.h
    uint16_t flags
    uint16_t domid
    uint32_t frame

cdef struct maptrack:
    uint32_t claim               # session << 16 | writable << 8 | track_state; 0 is free
    uint32_t gref
    uint32_t granter             # its domid, and its generation << 16
    uint32_t next                # next page of the same mapping, or itself

cdef enum port_state:
    PORT_FREE = 0
    PORT_UNBOUND = 1
    PORT_INTERDOMAIN = 2

cdef struct port_slot:
    uint32_t state
    uint32_t remote_domid
    uint32_t remote_port
    uint32_t pending
    uint32_t session
    uint32_t sent                # events that this end sent, for the tests' accounting
    uint32_t pad[2]

cdef struct domain_state:
    uint32_t domid
    uint32_t generation          # tells it from others that had the same number, 16 bits
    int memory_fd
    uint8_t *memory              # the whole of the domain's memory
    uint64_t memory_size
    grant_entry *grants          # its first frames
    uint32_t nr_grefs
    uint64_t *active
    maptrack *tracks
    uint32_t nr_tracks
    port_slot *slots
    uint32_t nr_slots

cdef int32_t pin(domain_state *granter, uint32_t gref, uint32_t mapper, bint writable,
                 uint32_t session, maptrack *track, uint32_t *frame) noexcept nogil
cdef void unpin(domain_state *granter, uint32_t session, maptrack *track) noexcept nogil
cdef maptrack *claim_track(domain_state *mapper, uint32_t session, uint32_t *hint) noexcept nogil
cdef void free_track(maptrack *track) noexcept nogil
cdef void grant(domain_state *own, uint32_t gref, uint32_t peer, uint32_t frame,
                uint32_t readonly) noexcept nogil
cdef int revoke(domain_state *own, uint32_t gref) noexcept nogil


cdef class DomainState:
    cdef domain_state c
    cdef void *heap
    cdef uint64_t heap_size
    cdef public object limits

    cdef void *map_whole(self, int fd, uint64_t size) except NULL
    cdef port_slot *slot(self, uint32_t port) except NULL
