# SPDX-License-Identifier: Apache-2.0
# Inline header of dataplane/front/.
"""From operations to ring requests: how they are cut, joined, and laid into granted pages.

Sectors of consecutive operations are packed without gaps, eight to a page, so that a request has
exactly as many grants as its data needs and no segment is empty. Up to 11 segments stand in the
slot itself; more go into pages of descriptors (indirect requests, Linux 402b27f9), because a direct
request is the cheaper one.

A unit is what goes on the ring at once: one request, or, where a guest page has more than 11 grants
and the backend knows no descriptors, the requests that carry whole guest pages (Linux 6cc56833).
They are linked by their operations: each has its status, and the last answer ends the operation.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from xvd.dataplane.abi cimport (
    BLKIF_MAX_SEGMENTS_PER_REQUEST, BLKIF_OP_DISCARD, BLKIF_OP_INDIRECT, BLKIF_OP_READ,
    BLKIF_SECTORS_PER_PAGE, BLKIF_SECTOR_SIZE, BLKIF_SEGMENTS_PER_INDIRECT_PAGE, XEN_PAGE_SIZE,
    blkif_layout, blkif_operations)
from xvd.dataplane.c cimport DEBUG_ASSERT, xvd_put16, xvd_put32, xvd_put64
from xvd.dataplane.front.pool cimport page_data, take_chain
from xvd.dataplane.front.queue cimport (
    SHADOW_FREE, SHADOW_IN_FLIGHT, front_queue, has_data, is_issued, is_rw, shadow)
from xvd.dataplane.latency cimport count_kind
from xvd.dataplane.ports cimport PAGES_EACH, front_io
from xvd.dataplane.ring.ring cimport front_free, front_next_slot, front_put


cdef inline uint32_t pages_for(uint64_t sectors) noexcept nogil:
    return <uint32_t>((sectors + BLKIF_SECTORS_PER_PAGE - 1) // BLKIF_SECTORS_PER_PAGE)


cdef inline uint32_t last_sect_of(const front_queue *q, uint64_t sectors) noexcept nogil:
    """The last sector of so many in their last page, as the backend counts them."""
    return <uint32_t>(((sectors - 1) % BLKIF_SECTORS_PER_PAGE + 1) // q.wire_sector - 1)


cdef inline uint32_t indirect_pages(uint32_t segments) noexcept nogil:
    """Pages of descriptors that so many segments need; none up to 11."""
    if segments <= BLKIF_MAX_SEGMENTS_PER_REQUEST:
        return 0
    return (segments + BLKIF_SEGMENTS_PER_INDIRECT_PAGE - 1) // BLKIF_SEGMENTS_PER_INDIRECT_PAGE


cdef inline bint goes_on(const front_io *io, const front_io *following) noexcept nogil:
    """Whether `following` begins on the disk where `io` ends, and may share a request with it."""
    return (following != NULL and is_rw(io) and following.operation == io.operation
            and not io.in_place and not following.in_place
            and following.sector_number == io.sector_number + io.nr_sectors)


cdef inline uint64_t next_sectors(const front_queue *q, const front_io *io) noexcept nogil:
    """How long the next unit is: the rest of `io`, and of what goes on from it, to the limit."""
    cdef uint64_t sectors = io.nr_sectors - io.queue.issued
    while sectors < q.unit_sectors and goes_on(io, io.next):
        io = io.next
        sectors += io.nr_sectors
    return min(sectors, <uint64_t>q.unit_sectors)


cdef inline void move_data(front_queue *q, const shadow *s, bint to_pages) noexcept nogil:
    """Copy between a request's pages and the buffers of its operations."""
    cdef const front_io *io = s.io
    cdef uint64_t at = s.at
    cdef uint32_t page = s.first_page, left = s.size, within, size
    cdef uint8_t *data
    while left:
        data = page_data(&q.pool, page)
        within = 0
        while within < XEN_PAGE_SIZE and left:
            size = <uint32_t>min(<uint64_t>min(XEN_PAGE_SIZE - within, left),
                                 io.nr_sectors * BLKIF_SECTOR_SIZE - at)
            if to_pages:
                memcpy(data + within, io.buffer + at, size)
            else:
                memcpy(io.buffer + at, data + within, size)
            within += size
            left -= size
            at += size
            if at == io.nr_sectors * BLKIF_SECTOR_SIZE:
                io = io.queue.follow
                at = 0
        page = q.pool.next[page]


cdef inline void claim(front_queue *q, shadow *s, uint64_t sectors) noexcept nogil:
    """Count the next `sectors` of the queued operations as issued, in this request."""
    cdef front_io *io = s.io
    cdef uint64_t size
    s.at = io.queue.issued * BLKIF_SECTOR_SIZE
    s.size = <uint32_t>sectors * BLKIF_SECTOR_SIZE
    q.count.split += io.queue.started
    while True:
        size = min(sectors, io.nr_sectors - io.queue.issued)
        io.queue.issued += size
        io.queue.started = 1
        io.queue.outstanding += 1
        sectors -= size
        if sectors == 0:
            return
        io.queue.follow = io.next
        io = io.next
        q.count.merged += 1


cdef inline void wipe_page(front_queue *q, uint32_t page, uint32_t used) noexcept nogil:
    memset(page_data(&q.pool, page) + used, 0, XEN_PAGE_SIZE - used)


cdef inline void wipe_chain(front_queue *q, const shadow *s) noexcept nogil:
    """Clear what the data of a write will not cover, and all of what a read is to fill."""
    cdef uint32_t page = s.first_page, left = s.size, i, used
    for i in range(s.nr_pages):
        used = min(left, <uint32_t>XEN_PAGE_SIZE)
        wipe_page(q, page, 0 if s.operation == BLKIF_OP_READ else used)
        left -= used
        page = q.pool.next[page]


cdef inline uint32_t put_segments(front_queue *q, uint8_t *segment, uint32_t page, uint32_t count,
                                  uint32_t last_sect) noexcept nogil:
    """Describe `count` pages of a chain, the last up to `last_sect`; the page after them."""
    cdef const blkif_layout *at = q.ring.layout
    cdef uint32_t i, whole = last_sect_of(q, BLKIF_SECTORS_PER_PAGE)
    for i in range(count):
        memset(segment, 0, at.segment_size)
        xvd_put32(segment + at.segment_gref, q.pool.ports.grefs[page])
        segment[at.segment_last_sect] = <uint8_t>(last_sect if i + 1 == count else whole)
        segment += at.segment_size
        page = q.pool.next[page]
    return page


cdef inline void put_direct(front_queue *q, uint8_t *slot, uint32_t id, uint64_t sector_number,
                            uint32_t last_sect) noexcept nogil:
    cdef const blkif_layout *at = q.ring.layout
    cdef shadow *s = &q.shadows[id]
    slot[at.rw_nr_segments] = <uint8_t>s.nr_pages
    xvd_put16(slot + at.rw_handle, q.handle)
    xvd_put64(slot + at.rw_id, id)
    xvd_put64(slot + at.rw_sector_number, sector_number)
    put_segments(q, slot + at.rw_seg, s.first_page, s.nr_pages, last_sect)


cdef inline void put_indirect(front_queue *q, uint8_t *slot, uint32_t id, uint64_t sector_number,
                              uint32_t last_sect) noexcept nogil:
    """An indirect request: its descriptors lie in pages of ours that the backend only reads."""
    cdef const blkif_layout *at = q.ring.layout
    cdef shadow *s = &q.shadows[id]
    cdef uint32_t i, here, data = s.first_page, left = s.nr_pages
    cdef uint32_t page = take_chain(&q.pool, s.nr_indirect, True)
    s.first_indirect = page
    slot[at.rw_operation] = BLKIF_OP_INDIRECT
    slot[at.indirect_op] = s.operation
    xvd_put16(slot + at.indirect_nr_segments, s.nr_pages)
    xvd_put16(slot + at.indirect_handle, q.handle)
    xvd_put64(slot + at.indirect_id, id)
    xvd_put64(slot + at.indirect_sector_number, sector_number)
    for i in range(s.nr_indirect):
        here = min(left, <uint32_t>BLKIF_SEGMENTS_PER_INDIRECT_PAGE)
        left -= here
        xvd_put32(slot + at.indirect_grefs + 4 * i, q.pool.ports.grefs[page])
        data = put_segments(q, page_data(&q.pool, page), data, here,
                            last_sect_of(q, BLKIF_SECTORS_PER_PAGE) if left else last_sect)
        if q.wipe:
            wipe_page(q, page, here * at.segment_size)
        page = q.pool.next[page]
    q.count.indirect += 1


cdef inline void take_in_place(front_queue *q, shadow *s) noexcept nogil:
    """The operation's own pages, from where the last request's ended: requests but the last one
    end with a page."""
    cdef uint32_t page = s.io.queue.next_page, i
    s.in_place = 1
    s.first_page = page
    for i in range(s.nr_pages):
        page = q.pool.next[page]
    s.io.queue.next_page = page


cdef inline void put_data(front_queue *q, uint8_t *slot, uint32_t id,
                          uint64_t sectors) noexcept nogil:
    """A request with data: the next `sectors` of the queued operations."""
    cdef shadow *s = &q.shadows[id]
    cdef uint64_t sector_number = s.io.sector_number + s.io.queue.issued
    cdef bint writes = s.operation != BLKIF_OP_READ
    cdef uint32_t last_sect = last_sect_of(q, sectors)
    sector_number //= q.wire_sector
    claim(q, s, sectors)
    s.nr_pages = <uint16_t>pages_for(sectors)
    s.nr_indirect = <uint8_t>indirect_pages(s.nr_pages)
    if s.io.in_place:
        take_in_place(q, s)
    else:
        s.first_page = take_chain(&q.pool, s.nr_pages, writes)
    if q.wipe:
        wipe_chain(q, s)
    if writes and not s.in_place:
        move_data(q, s, True)
    if s.nr_indirect:
        put_indirect(q, slot, id, sector_number, last_sect)
    else:
        put_direct(q, slot, id, sector_number, last_sect)


cdef inline void put_bare(front_queue *q, uint8_t *slot, uint32_t id, front_io *io) noexcept nogil:
    """A request without data: flush, empty barrier, or discard."""
    cdef const blkif_layout *at = q.ring.layout
    io.queue.started = 1
    io.queue.outstanding += 1
    if io.operation == BLKIF_OP_DISCARD:
        slot[at.discard_flag] = io.flag
        xvd_put16(slot + at.discard_handle, q.handle)
        xvd_put64(slot + at.discard_id, id)
        xvd_put64(slot + at.discard_sector_number, io.sector_number // q.wire_sector)
        xvd_put64(slot + at.discard_nr_sectors, io.nr_sectors // q.wire_sector)
    else:
        xvd_put16(slot + at.rw_handle, q.handle)
        xvd_put64(slot + at.rw_id, id)


cdef inline void put(front_queue *q, front_io *io, uint64_t sectors) noexcept nogil:
    """Put one request on the ring; there are a slot, a shadow, and pages for `sectors`."""
    cdef uint8_t *slot = front_next_slot(&q.ring)
    cdef uint32_t id
    q.nr_free -= 1
    id = q.free_ids[q.nr_free]
    DEBUG_ASSERT(q.shadows[id].state == SHADOW_FREE)
    memset(&q.shadows[id], 0, sizeof(shadow))
    q.shadows[id].state = SHADOW_IN_FLIGHT
    q.shadows[id].operation = io.operation
    q.shadows[id].io = io
    q.shadows[id].begun_ns = q.now_ns
    memset(slot, 0, q.ring.layout.entry_size)
    slot[q.ring.layout.rw_operation] = io.operation
    if sectors:
        put_data(q, slot, id, sectors)
    else:
        put_bare(q, slot, id, io)
    front_put(&q.ring)
    q.in_flight += 1
    q.count.requests += 1
    count_kind(&q.kinds, blkif_operations[io.operation].kind, sectors)


cdef inline uint32_t pages_of_unit(const front_queue *q, uint64_t sectors,
                                   bint in_place) noexcept nogil:
    """Pages to be taken for a unit of so many sectors; of one in place, for descriptors only."""
    cdef uint32_t whole = pages_for(q.sectors_max), rest = pages_for(sectors % q.sectors_max)
    cdef uint32_t requests = <uint32_t>(sectors // q.sectors_max)
    cdef uint32_t pages = requests * indirect_pages(whole) + indirect_pages(rest)
    return pages if in_place else pages + requests * whole + rest


cdef inline bint has_room(front_queue *q, const front_io *io, uint64_t sectors) noexcept nogil:
    """Whether a unit of so many sectors can go out now, whole and with all of its pages."""
    cdef uint32_t requests = <uint32_t>((sectors + q.sectors_max - 1) // q.sectors_max)
    return (max(requests, <uint32_t>1) <= min(q.nr_free, front_free(&q.ring))
            and pages_of_unit(q, sectors, io.in_place) <= q.pool.nr_free)


cdef inline uint32_t put_unit(front_queue *q, uint64_t sectors) noexcept nogil:
    """Put the next unit on the ring, a bare request if it has no sectors; how many requests."""
    cdef uint32_t n = 0
    cdef uint64_t part
    while True:
        part = min(sectors, <uint64_t>q.sectors_max)
        put(q, q.queued.first, part)
        n += 1
        while q.queued.first != NULL and is_issued(q.queued.first):
            q.queued.first = q.queued.first.next
        sectors -= part
        if sectors == 0:
            break
    if q.queued.first == NULL:
        q.queued.last = NULL
    return n


cdef inline uint32_t issue(front_queue *q, uint32_t budget) noexcept nogil:
    """Move queued operations onto the ring, in order, as far as there is room."""
    cdef uint32_t n = 0
    cdef uint64_t sectors, most = <uint64_t>budget * PAGES_EACH * BLKIF_SECTORS_PER_PAGE, all = 0
    while q.queued.first != NULL and n < budget and all < most:
        sectors = next_sectors(q, q.queued.first) if has_data(q.queued.first) else 0
        if not has_room(q, q.queued.first, sectors):
            q.count.waits += 1
            break
        n += put_unit(q, sectors)
        all += sectors
    return n
