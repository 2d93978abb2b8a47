# SPDX-License-Identifier: Apache-2.0
# Inline header of engines/.
"""One split virtqueue of a vhost-user-blk server: where it lies, its slots, and what is in flight.

The virtqueue is that of virtio 1.2, section 2.7, and its requests those of section 5.2. Each slot
has three descriptors that never change: header, data, status. Data is copied into the slot and out
of it: the server has that memory mapped once and for all, and never a guest's.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from posix.unistd cimport write

from xvd.dataplane.c cimport xvd_fence, xvd_load16_acquire, xvd_store16_release
from xvd.dataplane.ports cimport ENGINE_UNMAP, engine_io
from xvd.engines.channel cimport done_list, pthread_mutex_t
from xvd.engines.unflushed cimport unflushed

cdef enum:
    RING = 512                   # descriptors: a power of two
    EACH = 4                     # of a slot, which has three: no two share a line of the cache
    SLOTS = 128
    SLOT_BYTES = 128 << 10
    SLOT_STRIDE = SLOT_BYTES + 4096  # at a power of two all their first pages would be in the same
                                 # few sets of the cache
    LINE = 64                    # of the cache
    NO_ROOM = 0xFFFF

# Where things lie in a channel's area. `layout` tells it to whoever sets the server up.
cdef enum:
    DESCRIPTORS_AT = 0
    AVAILABLE_AT = 16 * RING
    USED_AT = AVAILABLE_AT + 2048
    HEADERS_AT = USED_AT + 8192
    STATUS_IN = 16               # behind the header of its slot
    DATA_AT = HEADERS_AT + LINE * SLOTS + 2048  # at a page
    AREA = DATA_AT + SLOTS * SLOT_STRIDE

# virtio 1.2, 2.7.5 and 5.2.6.
cdef enum:
    DESC_NEXT = 1
    DESC_WRITE = 2
    BLK_IN = 0
    BLK_OUT = 1
    BLK_FLUSH = 4
    BLK_DISCARD = 11
    BLK_WRITE_ZEROES = 13
    RANGE_UNMAP = 1              # of zeros: they need no space
    STATUS_OK = 0
    STATUS_UNSUPPORTED = 2
    UNANSWERED = 0xFF

cdef struct descriptor:
    uint64_t addr
    uint32_t len
    uint16_t flags
    uint16_t next

cdef struct blk_header:
    uint32_t type
    uint32_t ioprio
    uint64_t sector

# What becomes of a write of zeros in its slot.
cdef enum zeroes:
    NO_ZEROES = 0
    ZEROES_ASKED_FOR = 1         # as a range, without data
    ZEROES_WRITTEN = 2           # as data: the server has nothing else, or has failed

cdef struct range_part:
    uint64_t sector
    uint32_t num_sectors
    uint32_t flags

cdef struct used_entry:
    uint32_t id
    uint32_t len

# Of one storage, through all its channels. A flush is one of all that was answered before it began,
# on whichever channel: what was written there before something newer elsewhere, and was flushed
# with it, is not to be written again.
cdef struct written:
    uint64_t answered            # writes and discards
    uint64_t flushed             # the first so many of them are on the storage

cdef struct slot:
    engine_io *io                # NULL: a flush of our own
    uint64_t at                  # where in the operation's data
    uint64_t length
    uint64_t reserved            # in the log
    uint64_t covers              # a flush: how many writes had been answered when it began
    zeroes zeroed
    uint32_t busy                # 1: in flight
    uint16_t after               # in the list of those in flight, in order
    uint16_t before

cdef struct vhost:
    pthread_mutex_t mutex
    uint8_t *area
    descriptor *descriptors
    uint16_t *available          # flags, idx, RING entries, used_event
    uint16_t *used               # flags, idx
    used_entry *used_entries
    uint16_t *kick_from          # the server's avail_event
    slot slots[SLOTS]
    uint16_t free_slots[SLOTS]
    uint16_t nr_free
    uint16_t first, last         # in flight, oldest and youngest; NO_ROOM: none
    uint16_t prod                # requests published, modulo 2^16
    uint16_t kicked              # of those, what the server was told of
    uint16_t cons                # answers taken
    uint32_t live                # 1: there is a server
    uint32_t asked               # 1: the thread asks for an event, and hears of nothing else
    uint32_t flushing            # 1: a flush of our own is in flight
    uint32_t flush_failed        # 1: one has failed, and none of the guest's succeeds any more
    uint64_t discard_bytes       # most in one request
    uint32_t can_zero            # 1: the server has zeros without data
    int kick_fd
    int call_fd
    engine_io *waiting           # not begun, or not all of it; oldest first
    engine_io *waiting_last
    uint64_t begun               # of the first of these, bytes
    done_list done
    unflushed log
    written *writes              # of the storage, through all channels


# ---- Slots -------------------------------------------------------------------------------------

cdef inline uint8_t *data_of(vhost *v, uint16_t number) noexcept nogil:
    return v.area + DATA_AT + <size_t>number * SLOT_STRIDE


cdef inline blk_header *header_of(vhost *v, uint16_t number) noexcept nogil:
    return <blk_header *>(v.area + HEADERS_AT + LINE * number)


cdef inline uint8_t *status_of(vhost *v, uint16_t number) noexcept nogil:
    return v.area + HEADERS_AT + LINE * number + STATUS_IN


cdef inline void link(vhost *v, uint16_t number) noexcept nogil:
    """At the end of those in flight."""
    v.slots[number].after = NO_ROOM
    v.slots[number].before = v.last
    if v.last == NO_ROOM:
        v.first = number
    else:
        v.slots[v.last].after = number
    v.last = number


cdef inline void unlink(vhost *v, uint16_t number) noexcept nogil:
    cdef slot *s = &v.slots[number]
    if s.before == NO_ROOM:
        v.first = s.after
    else:
        v.slots[s.before].after = s.after
    if s.after == NO_ROOM:
        v.last = s.before
    else:
        v.slots[s.after].before = s.before
    s.busy = 0
    v.free_slots[v.nr_free] = number
    v.nr_free += 1


cdef inline void publish(vhost *v, uint16_t number) noexcept nogil:
    """Put a slot's request on the ring; the server is told of several together."""
    v.available[2 + v.prod % RING] = number * EACH
    v.prod += 1
    xvd_store16_release(&v.available[1], v.prod)


cdef inline void kick(vhost *v) noexcept nogil:
    """Tell the server of what it may not know of (virtio 1.2, 2.7.10)."""
    cdef uint64_t one = 1
    cdef uint16_t event
    if not v.live or v.prod == v.kicked:
        return
    xvd_fence()
    event = xvd_load16_acquire(v.kick_from)
    if <uint16_t>(v.prod - event - 1) < <uint16_t>(v.prod - v.kicked):
        write(v.kick_fd, &one, 8)
    v.kicked = v.prod


# ---- Data --------------------------------------------------------------------------------------

cdef inline void copy(vhost *v, engine_io *io, uint64_t at, uint8_t *data, uint64_t size,
               bint in_) noexcept nogil:
    """Between a slot and the operation's memory, from its byte `at` on."""
    cdef uint32_t i = 0
    cdef uint64_t part
    while at >= io.iov[i].iov_len:
        at -= io.iov[i].iov_len
        i += 1
    while size:
        part = min(size, io.iov[i].iov_len - at)
        if in_:
            memcpy(data, <uint8_t *>io.iov[i].iov_base + at, part)
        else:
            memcpy(<uint8_t *>io.iov[i].iov_base + at, data, part)
        data += part
        size -= part
        at = 0
        i += 1


# ---- To the server -----------------------------------------------------------------------------

cdef inline void describe(vhost *v, uint16_t number, uint32_t kind, uint64_t offset,
                   uint32_t size) noexcept nogil:
    """Fill in a slot's header, and how much of its data counts.

    Descriptors that stay as they are are not written: the server has them in its cache.
    """
    cdef blk_header *header = header_of(v, number)
    cdef descriptor *d = v.descriptors + number * EACH
    cdef uint16_t next = number * EACH + (1 if size else 2)
    cdef uint16_t flags = DESC_NEXT | (DESC_WRITE if kind == BLK_IN else 0)
    header.type = kind
    header.ioprio = 0
    header.sector = offset // 512
    status_of(v, number)[0] = UNANSWERED
    if d[0].next != next:
        d[0].next = next
    if d[1].len != size:
        d[1].len = size
    if d[1].flags != flags:
        d[1].flags = flags


cdef inline void describe_range(vhost *v, uint16_t number, uint32_t kind, uint64_t offset,
                                uint64_t length, uint32_t flags) noexcept nogil:
    """Fill in a slot whose request is of a range and has no data."""
    cdef range_part *range_ = <range_part *>data_of(v, number)
    range_.sector = offset // 512
    range_.num_sectors = <uint32_t>(length // 512)
    range_.flags = flags
    describe(v, number, kind, 0, sizeof(range_part))


cdef inline void describe_zeroes(vhost *v, uint16_t number, zeroes how) noexcept nogil:
    """Fill in a slot whose part of an operation is zeros."""
    cdef slot *s = &v.slots[number]
    cdef uint64_t offset = s.io.offset + s.at
    s.zeroed = how
    if how == ZEROES_ASKED_FOR:
        describe_range(v, number, BLK_WRITE_ZEROES, offset, s.length,
                       RANGE_UNMAP if s.io.flags & ENGINE_UNMAP else 0)
    else:
        memset(data_of(v, number), 0, s.length)
        describe(v, number, BLK_OUT, offset, <uint32_t>s.length)


cdef inline uint16_t take_slot(vhost *v, engine_io *io, uint64_t at,
                               uint64_t length) noexcept nogil:
    v.nr_free -= 1
    cdef uint16_t number = v.free_slots[v.nr_free]
    cdef slot *s = &v.slots[number]
    s.io = io
    s.at = at
    s.length = length
    s.reserved = s.covers = 0
    s.zeroed = NO_ZEROES
    s.busy = 1
    link(v, number)
    return number
